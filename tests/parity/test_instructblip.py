"""Our InstructBLIP against transformers' in float32: queries, logits, tokens; then pruned."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catp_jax.contract import Site
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.pruning import CATP, FastV, SelfAttention
from catp_jax.struct import replace
from tests.parity.test_blip2 import self_attention
from tests.parity.tiny import relative_difference
from tests.parity.tiny_blip2 import QUERIES, Side
from tests.parity.tiny_instructblip import T5S, VICUNAS, Prompts, tiny

TOLERANCE = 1e-5  # of the reference's scale
NEW, PAD = 8, 1
front = jax.jit(lambda model, inputs: model.front(inputs))
forward = jax.jit(lambda model, inputs, tokens=None: model(inputs, decoder_tokens=tokens))


def weights(attention: Any, valid: np.ndarray | None = None) -> np.ndarray:
    """What an attention layer puts on each column, [b, h, s, n], in float64 by NumPy."""
    queries, keys = (np.asarray(a, np.float64) for a in (attention.queries, attention.keys))
    logits = np.einsum("bshd,bnhd->bhsn", queries, keys)
    if valid is not None:
        logits = np.where(valid[:, None, None], logits, -np.inf)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ["vicuna grouped", "t5"])
def test_queries_and_their_evidence_depend_on_the_instruction_and_its_padding_is_not_seen(name):
    """Prompts 0 and 2 share image 1; the view shows each its own attention."""
    hf, ours, config = tiny(name)
    prompts, index = Prompts(config, 2), [1, 0, 1]
    inputs = replace(prompts.ours("right"), image_index=jnp.asarray(index, jnp.int32))
    view = front(ours, inputs).view
    theirs = prompts.hf("right")
    with torch.no_grad(), self_attention(hf.qformer) as among:
        vision = hf.vision_model(theirs["pixel_values"][index], output_attentions=True)
        mask = torch.cat(
            [torch.ones((3, QUERIES), dtype=torch.int64), theirs["qformer_attention_mask"]], 1
        )
        out = hf.qformer(
            input_ids=theirs["qformer_input_ids"],
            attention_mask=mask,
            query_embeds=hf.query_tokens.expand(3, -1, -1),
            encoder_hidden_states=vision.last_hidden_state,
            output_attentions=True,
        )
    assert relative_difference(view.tokens, out.last_hidden_state[:, :QUERIES]) < TOLERANCE
    evidence, valid = view.evidence, mask.bool().numpy()
    np.testing.assert_array_equal(evidence.among_valid, valid)
    assert len(evidence.cross) == len(out.cross_attentions) == len(config.qformer.cross_layers)
    assert len(evidence.among) == len(among) == config.qformer.num_hidden_layers
    for mine, reference in zip(evidence.cross, out.cross_attentions, strict=True):
        assert relative_difference(weights(mine), reference) < TOLERANCE
    for mine, reference in zip(evidence.among, among, strict=True):
        assert relative_difference(weights(mine, valid), reference[:, :, :QUERIES]) < TOLERANCE
    assert relative_difference(weights(evidence.vision), vision.attentions[-1]) < TOLERANCE
    assert np.abs(np.asarray(view.tokens[0] - view.tokens[2])).max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VICUNAS)
def test_logits_of_every_row_with_vicuna(name: str, side: Side):
    hf, ours, config = tiny(name)
    prompts = Prompts(config, 3)
    inputs = prompts.hf(side)
    with torch.no_grad():
        theirs = hf(**inputs).logits
    mine = forward(ours, prompts.ours(side))
    own = np.concatenate([np.ones((3, QUERIES), bool), prompts.tokens(side)[1]], axis=1)
    reference = theirs[inputs["attention_mask"].bool()]
    assert relative_difference(np.asarray(mine)[own], reference) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", T5S)
def test_logits_of_every_row_with_t5(name: str, side: Side):
    hf, ours, config = tiny(name)
    prompts = Prompts(config, 3)
    tokens = np.random.default_rng(4).integers(2, 40, (3, 5)).astype(np.int32)
    tokens[:, 0] = 0
    after = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        theirs = hf(**prompts.hf(side), decoder_input_ids=after).logits
    assert relative_difference(forward(ours, prompts.ours(side), tokens), theirs) < TOLERANCE


def theirs(name: str, inputs: dict[str, torch.Tensor], **options: Any) -> np.ndarray:
    """transformers' new tokens."""
    hf, _, _ = tiny(name)
    with torch.no_grad():
        out = hf.generate(
            **inputs,
            max_new_tokens=NEW,
            pad_token_id=PAD,
            do_sample=False,
            # T5's cache of transformers wants as many decoder layers as encoder layers
            use_cache=not name.startswith("t5"),
            **options,
        ).numpy()
    out = out[:, 1 if name.startswith("t5") else inputs["input_ids"].shape[1] :]
    return np.pad(out, ((0, 0), (0, NEW - out.shape[1])), constant_values=PAD)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["vicuna grouped", "t5"])
def test_tokens_are_transformers(name: str, num_beams: int):
    """With an end token that does come up, after a few tokens."""
    _, ours, config = tiny(name)
    prompts = Prompts(config, 0)
    inputs, batch = prompts.hf("left"), prompts.ours("left")
    free = theirs(name, inputs, num_beams=num_beams, eos_token_id=[98])
    end = int(free[2, 2])
    expected = theirs(name, inputs, num_beams=num_beams, eos_token_id=[end])
    assert (expected != free).any()
    pad = jnp.asarray(PAD, jnp.int32)
    for ends, tokens in ((98, free), (end, expected)):
        stop = jnp.asarray([ends], jnp.int32)
        if num_beams == 1:
            out = programs.generate(
                ours, (), batch, sampling(3), Stop(ends=stop, pad=pad, max_new_tokens=NEW)
            )
        else:
            how = beams(num_beams)
            out = programs.generate(
                ours, (), batch, how, Stop(ends=stop, pad=pad, max_new_tokens=NEW)
            )
        np.testing.assert_array_equal(out.tokens, tokens)


prefill = functools.partial(programs.prefill, new_slots=2)


def room(cache: Any) -> list[int]:
    """The slots of every layer that the prompt takes."""
    if hasattr(cache, "cross"):
        return [block.keys.shape[2] for block in cache.cross.blocks]
    return [block.keys.shape[2] for prompt in cache.prompts for block in prompt.blocks]


@pytest.mark.parametrize("name", ["vicuna", "t5"])
def test_pruned_queries_leave_a_shorter_sequence(name: str):
    _, ours, config = tiny(name)
    inside = {Site.LAYER, Site.CACHE, Site.READ} if name == "vicuna" else set()
    assert ours.sites == {Site.ENTRY} | inside
    inputs = Prompts(config, 5).ours("right")
    out = prefill(ours, (CATP(keep=3),), inputs)
    assert room(out.cache) == [inputs.tokens.shape[1] + 3] * 3
    assert out.selection.kept.indices.shape == (3, 3)


def test_everything_kept_changes_nothing():
    _, ours, config = tiny("vicuna")
    prompts = Prompts(config, 6)
    inputs = prompts.ours("right")
    last = QUERIES + np.asarray(prompts.lengths) - 1
    out = prefill(ours, (CATP(keep=QUERIES),), inputs)
    every = np.asarray(forward(ours, inputs))
    np.testing.assert_allclose(out.logits, every[np.arange(3), last], rtol=1e-5, atol=1e-5)


def chosen(pruner: Any, inputs: Any) -> np.ndarray:
    """What a method keeps of the tiny T5's queries."""
    view = front(tiny("t5")[1], inputs).view
    return np.asarray(pruner(view, pruner.start(view))[0].tokens.indices)


def test_self_attention_counts_what_the_queries_get_from_the_queries():
    _, ours, config = tiny("t5")
    inputs = Prompts(config, 7).ours("right")
    evidence = front(ours, inputs).view.evidence
    valid = np.asarray(evidence.among_valid)
    score = sum(weights(layer, valid).sum(axis=(1, 2))[:, :QUERIES] for layer in evidence.among)
    expected = np.sort(np.argsort(-score, axis=1)[:, :3], axis=1)
    np.testing.assert_array_equal(chosen(SelfAttention(keep=3), inputs), expected)


def test_nothing_depends_on_the_padding_of_the_instruction():
    """Even if it is longer than the Q-Former has positions."""
    _, ours, config = tiny("t5")
    inputs = Prompts(config, 8).ours("right")
    longer = replace(
        inputs,
        instruction=jnp.pad(inputs.instruction, ((0, 0), (0, 40)), constant_values=7),
        instruction_valid=jnp.pad(inputs.instruction_valid, ((0, 0), (0, 40))),
    )
    assert longer.instruction.shape[1] > config.qformer.max_position_embeddings
    one, other = (front(ours, batch).visual for batch in (inputs, longer))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    for pruner in (SelfAttention(keep=3), CATP(keep=3)):
        np.testing.assert_array_equal(chosen(pruner, inputs), chosen(pruner, longer))


def test_fastv_between_vicunas_layers():
    """What the last row of the layer before looks at, by transformers' own attention."""
    hf, ours, config = tiny("vicuna grouped")
    prompts, layer = Prompts(config, 9), 2
    inputs = prompts.ours("right")
    text = inputs.tokens.shape[1]
    out = prefill(ours, (FastV(keep=3, site=Site.LAYER, layer=layer),), inputs)
    assert room(out.cache) == [text + QUERIES] * layer + [text + 3]
    kept = np.asarray(out.selection.kept.indices)
    with torch.no_grad():
        their = hf(**prompts.hf("right"), output_attentions=True)
    attention = their.language_model_outputs.attentions[layer - 1]
    for row, length in enumerate(prompts.lengths):
        seen = attention[row, :, QUERIES + length - 1, :QUERIES].mean(dim=0).numpy()
        assert kept[row].tolist() == sorted(np.argsort(-seen)[:3].tolist())
    logits, cache, _ = programs.step(ours, (), jnp.full(3, 5, jnp.int32), out.cache)
    assert np.isfinite(logits).all()
    assert room(cache) == [text + QUERIES] * layer + [text + 3]
