"""Compiled programs on tiny BLIP-2s: against transformers and slow references, step by step against
whole, how often they compile, and what beam search moves.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catp_jax.contract import Reduction, Site, View
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.rules import Rules
from catp_jax.generation.sampling import sampling
from catp_jax.models.frozen import freeze
from catp_jax.pruning import CATP, Position
from catp_jax.pruning.scores import Scored, keep_best
from catp_jax.readers.blip2_packing import pack
from catp_jax.struct import pytree, replace, static
from tests.blip2_methods import (
    AT_ENTRY,
    BUDGET,
    LAYER,
    NEW,
    choose,
    difference,
    fastv,
    generate,
    own,
    pruned_inside,
    unpruned,
    whole,
)
from tests.parity.tiny_blip2 import Prompts, tiny
from tests.pruning import oracles
from tests.random_blip2 import (
    CONFIGS,
    IMAGES,
    KINDS,
    NEVER,
    OPT,
    PAD,
    PROMPTS,
    QUERIES,
    T5,
    Kind,
    packed,
    photo,
    random_blip2,
)

both = pytest.mark.parametrize("kind", KINDS)

# --- against transformers ---------------------------------------------------------------------


@both
def test_pruned_answers_are_those_of_transformers_language_model_on_the_kept_queries(kind: Kind):
    hf, model, config = tiny(f"{kind} untied")
    prompts = Prompts(config, seed=3)
    inputs, keep = prompts.ours("left"), 3
    out = programs.generate(
        model,
        (CATP(keep=keep),),
        inputs,
        sampling(3),
        Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW),
    )
    cross: list[torch.Tensor] = []
    hooks = [
        layer.crossattention.attention.register_forward_hook(
            lambda module, arguments, output: cross.append(output[1])
        )
        for layer in hf.qformer.encoder.layer
        if layer.has_cross_attention
    ]
    with torch.no_grad():
        image = hf.vision_model(torch.from_numpy(prompts.pixels())).last_hidden_state
        queries = hf.query_tokens.expand(len(image), -1, -1)
        seen = hf.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        visual = hf.language_projection(seen)
        for hook in hooks:
            hook.remove()
        tokens, valid = prompts.tokens("left")
        for row in range(3):
            kept = oracles.best(votes_of_weights(cross[-1][row].numpy()), keep)
            assert own(out.selection.kept, row) == kept
            words = torch.from_numpy(tokens[row][valid[row]].astype(np.int64))
            embeddings = hf.get_input_embeddings()(words)
            embeddings = torch.cat([visual[row, kept], embeddings])[None]
            answer = hf.language_model.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
                max_new_tokens=NEW,
                eos_token_id=[98],
                pad_token_id=1,
                do_sample=False,
                use_cache=kind == "opt",
            )
            assert out.tokens[row].tolist() == answer[0, -NEW:].tolist()


def votes_of_weights(weights: np.ndarray) -> list[float]:
    """The paper's points from attention weights [heads, queries, image tokens]."""
    ranks = np.argsort(np.argsort(weights, axis=1, kind="stable"), axis=1, kind="stable")
    return ranks.sum(axis=(0, 2)).astype(float).tolist()


# --- cut in two --------------------------------------------------------------------------------


@pytree
class Longest(Scored):
    """Finds its own number: queries longer than the row's mean."""

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY,)

    keep: Any = static(default=None)
    site: Site = static(default=Site.ENTRY)

    def score(self, view: View) -> Any:
        return jnp.linalg.norm(view.tokens.astype(jnp.float32), axis=-1)

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        score = self.score(view)
        asked = view.valid & (score > score.mean(axis=1, keepdims=True))
        return Reduction(tokens=keep_best(score.shape[1], asked, score)), state


@pytest.mark.parametrize(
    "after",
    [
        (Position(keep=3),),
        (Position(keep=3), fastv(2)),
        (fastv(3, 1), fastv(2, 2)),
    ],
    ids=["the same site", "both", "two later sites"],
)
def test_pruners_after_one_that_finds_its_own_number_have_their_turn(after: tuple[Any, ...]):
    model, batch, pruners = random_blip2("opt"), packed(), (Longest(), *after)
    whole = generate("opt", pruners, batch)
    front, keep, selection = programs.select_tokens(model, pruners, batch.inputs)
    wanted = int(keep.valid.sum(axis=1).max())
    keep, selection = programs.truncate(keep, selection, wanted)
    choice = sampling(len(batch.available))
    out = programs.generate_from(
        model,
        pruners,
        front,
        keep,
        selection,
        choice,
        Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW),
    )
    np.testing.assert_array_equal(out.tokens, whole.tokens)
    assert difference(out.logits, whole.logits) <= 1e-5
    assert out.selection.states == whole.selection.states == ((),) * len(pruners)
    for row in range(len(batch.available)):
        assert own(out.selection.kept, row) == own(whole.selection.kept, row)


def test_a_pruner_without_a_place_is_an_error_after_the_cut_too():
    model, batch, pruners = random_blip2("opt"), packed(), (Longest(), fastv(2, 99))
    front, keep, selection = programs.select_tokens(model, pruners, batch.inputs)
    choice = sampling(len(batch.available))
    with pytest.raises(ValueError, match="FastV works at layer 99"):
        programs.generate_from(
            model,
            pruners,
            front,
            keep,
            selection,
            choice,
            Stop(ends=NEVER, pad=PAD, max_new_tokens=1),
        )


# --- cached = uncached ------------------------------------------------------------------------


read = jax.jit(lambda model, *given: model(*given))


@both
@pytest.mark.parametrize("method", [None, "catp", "l2"])
def test_cached_decoding_is_reading_the_grown_text_from_scratch(kind: Kind, method: str | None):
    out = unpruned(kind) if method is None else whole(kind)[method]
    keep, model, answers = out.selection.kept, random_blip2(kind), np.asarray(out.tokens)
    inputs, room = packed().inputs, QUERIES if method is None else BUDGET
    for step in range(NEW):
        if kind == "opt":
            grown = [
                (*prompt, *answer[:step])
                for prompt, answer in zip(PROMPTS, answers.tolist(), strict=True)
            ]
            logits = read(model, pack(grown, IMAGES, CONFIGS[kind]).inputs, keep)
            places = [room + len(tokens) - 1 for tokens in grown]
        else:
            started = np.zeros((4, NEW), np.int32)  # the start token, the answer so far, nothing
            started[:, 1 : step + 1] = answers[:, :step]
            logits = read(model, inputs, keep, jnp.asarray(started))
            places = [step] * 4
        here = np.asarray(logits)[np.arange(4), places]
        assert answers[:, step].tolist() == here.argmax(axis=1).tolist()
        if step == 0:
            assert difference(out.logits, here) <= 1e-5


CASES: list[tuple[Kind, tuple[Any, ...]]] = [
    ("opt", (CATP(keep=BUDGET),)),
    ("opt", (fastv(BUDGET),)),
    ("t5", (CATP(keep=BUDGET),)),
]


def reference(kind: Kind, pruners: tuple[Any, ...]) -> programs.Generated:
    return whole(kind)["catp"] if isinstance(pruners[0], CATP) else pruned_inside()


@pytest.mark.parametrize(("kind", "pruners"), CASES)
def test_prefill_and_steps_give_what_generate_gives(kind: Kind, pruners: tuple[Any, ...]):
    model, expected = random_blip2(kind), reference(kind, pruners)
    start = programs.prefill(model, pruners, packed().inputs, new_slots=NEW)
    assert difference(start.logits, expected.logits) <= 1e-5  # sums go another way
    logits, cache, tokens = start.logits, start.cache, []
    for _ in range(NEW):
        tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache, _ = programs.step(model, (), tokens[-1], cache)
    np.testing.assert_array_equal(jnp.stack(tokens, axis=1), expected.tokens)
    lengths = [len(tokens) + NEW for tokens in PROMPTS]
    if kind == "t5":
        assert cache.tail.next_slot.tolist() == [NEW + 1] * 4  # the start token has a slot too
        assert cache.cross.valid.sum(axis=1).tolist() == [len(t) + BUDGET for t in PROMPTS]
    else:
        assert cache.tail.next_slot.tolist() == [NEW] * 4
        for prompt in cache.prompts:
            visual = QUERIES if prompt is cache.prompts[0] and len(cache.prompts) > 1 else BUDGET
            assert prompt.valid.sum(axis=1).tolist() == [n - NEW + visual for n in lengths]


@pytest.mark.parametrize(("kind", "pruners"), CASES)
def test_step_reuses_the_memory_of_the_cache(kind: Kind, pruners: tuple[Any, ...]):
    model = random_blip2(kind)
    start = programs.prefill(model, pruners, packed().inputs, new_slots=NEW)
    token = jnp.zeros(4, jnp.int32)
    text = programs.step.lower(model, (), token, start.cache).compile().as_text()
    header = next(line for line in text.splitlines() if "input_output_alias" in line)
    buffers = jax.tree.leaves(start.cache)
    assert header.count("alias)") == len(buffers)
    programs.step(model, (), token, start.cache)
    assert all(buffer.is_deleted() for buffer in buffers)


@both
def test_a_frozen_model_gives_what_the_model_gives(kind: Kind):
    start = programs.prefill(
        freeze(random_blip2(kind)), (CATP(keep=BUDGET),), packed().inputs, new_slots=NEW
    )
    expected = whole(kind)["catp"]
    assert difference(start.logits, expected.logits) <= 1e-5  # sums go another way
    jax.tree.map(np.testing.assert_array_equal, start.selection.kept, expected.selection.kept)


# --- no compilation in the steady state -------------------------------------------------------


@both
def test_steady_state_compiles_nothing_and_a_new_budget_one_program(kind: Kind):
    def run(keep: int, weights: list[float], seed: int, size: int) -> None:
        rng = np.random.default_rng(seed)
        prompts = [tuple(rng.integers(2, 40, size + row).tolist()) for row in range(4)]
        shared = photo(seed)  # three images, as in the mixed batch
        images = [shared, photo(seed + 1), photo(seed + 2), shared]
        batch = pack(prompts, images, CONFIGS[kind])
        generate(kind, (CATP(keep=keep, weights=jnp.asarray(weights)),), batch)

    run(BUDGET, [1.0, 0.0], 0, 3)
    compiled = programs.generate._cache_size()
    for seed, size in enumerate((1, 7, 12), 50):
        run(BUDGET, [0.5 * seed, 1.0], seed, size)
    assert programs.generate._cache_size() == compiled
    run(BUDGET + 1, [1.0, 0.0], 1, 4)
    run(BUDGET + 1, [0.0, 1.0], 2, 5)
    assert programs.generate._cache_size() == compiled + 1


@both
def test_the_same_call_gives_the_same_result_and_leaves_its_inputs_alone(kind: Kind):
    model, batch = random_blip2(kind), packed()
    pruners = {name: make(BUDGET) for name, make in AT_ENTRY.items()}
    before = jax.tree.map(np.array, (model, pruners, batch.inputs))
    first, again = (choose(model, batch.inputs, pruners) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(np.testing.assert_array_equal, (model, pruners, batch.inputs), before)


# --- beam search: what a reordering moves -----------------------------------------------------


@functools.cache
def spread_cache(kind: Kind, is_pruned_inside: bool = False) -> Any:
    """A cache of three beams for each prompt, after two steps in which the beams differ."""
    pruners = (Position(keep=5), fastv(BUDGET)) if is_pruned_inside else (CATP(keep=BUDGET),)
    model = random_blip2(kind)
    cache = programs.prefill(model, pruners, packed().inputs, new_slots=4).cache
    cache = cache.spread(3)
    for step in range(2):
        tokens = (jnp.arange(12, dtype=jnp.int32) * 3 + step) % 47
        _, cache, _ = programs.step(model, (), tokens, cache)
    return cache


@pytest.mark.parametrize("case", [("opt", False), ("opt", True), ("t5", False)])
def test_reordering_beams_moves_what_they_see_alone(case: tuple):
    cache = spread_cache(*case)
    parents = np.asarray([2, 2, 0, 3, 5, 3, 8, 7, 6, 9, 9, 9], np.int32)  # of their own prompt
    moved = jax.jit(lambda c, p: c.reorder(p))(cache, jnp.asarray(parents))
    seen = np.asarray(cache.tail.seen)
    np.testing.assert_array_equal(moved.tail.seen, seen[parents])
    assert (seen[parents] != seen).any()
    jax.tree.map(
        np.testing.assert_array_equal,
        replace(moved, tail=replace(moved.tail, seen=cache.tail.seen)),
        cache,
    )


@pytest.mark.parametrize("case", [("opt", False), ("opt", True), ("t5", False)])
def test_beams_share_their_prompts_blocks_and_its_tail(case: tuple):
    cache = spread_cache(*case)
    arrays = ("positions", "seen", "next_slot", "next_position")
    rows = {name: getattr(cache.tail, name).shape[0] for name in arrays}
    assert rows == {"positions": 4, "seen": 12, "next_slot": 4, "next_position": 12}
    prompts = [part for name, part in vars(cache).items() if name != "tail"]
    blocks = jax.tree.leaves((cache.tail.blocks, prompts))
    assert {leaf.shape[0] for leaf in blocks} == {4}


@pytest.mark.parametrize(("kind", "pruners"), [CASES[1], CASES[2]])
def test_beam_search_with_pruning_is_one_program_and_one_beam_is_greedy(
    kind: Kind, pruners: tuple[Any, ...]
):
    def run(num_beams: int, **options: Any) -> programs.Generated:
        return programs.generate(
            random_blip2(kind),
            pruners,
            packed().inputs,
            beams(num_beams, **options),
            Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW),
        )

    greedy, compiled = run(1), programs.generate._cache_size()
    np.testing.assert_array_equal(greedy.tokens, reference(kind, pruners).tokens)
    three = run(3)
    run(3, length_penalty=-1.0, rules=Rules.of(min_new_tokens=2))
    assert programs.generate._cache_size() == compiled + 1
    jax.tree.map(np.testing.assert_array_equal, three.selection.kept, greedy.selection.kept)
    assert (np.asarray(three.tokens) != np.asarray(greedy.tokens)).any()


# --- exact sizes ------------------------------------------------------------------------------


def cache_of(kind: Kind, *pruners: Any) -> Any:
    return jax.eval_shape(
        lambda model, inputs: (
            programs.prefill.__wrapped__(model, pruners, inputs, new_slots=NEW).cache
        ),
        random_blip2(kind),
        packed().inputs,
    )


@pytest.mark.parametrize("keep", [1, BUDGET, QUERIES])
def test_opts_cache_has_the_kept_queries_the_text_and_the_new_tokens(keep: int):
    cache = cache_of("opt", Position(keep=keep))
    (own,), heads = cache.prompts, OPT.num_attention_heads
    assert len(own.blocks) == len(cache.tail.blocks) == OPT.num_hidden_layers
    for prompt, tail in zip(own.blocks, cache.tail.blocks, strict=True):
        assert prompt.keys.shape == prompt.values.shape == (4, heads, keep + 16, 4)
        assert tail.keys.shape == tail.values.shape == (4, heads, NEW, 4)
    assert own.valid.shape == (4, keep + 16)


def test_after_pruning_between_layers_opts_later_layers_have_smaller_caches():
    cache = cache_of("opt", CATP(keep=5), fastv(2))
    sizes = [[block.keys.shape[2] for block in prompt.blocks] for prompt in cache.prompts]
    assert sizes == [[5 + 16] * LAYER, [2 + 16]]
    assert cache_of("opt", fastv(2)).prompts[0].blocks[0].keys.shape[2] == QUERIES + 16


@pytest.mark.parametrize("keep", [1, BUDGET, QUERIES])
def test_t5s_cross_attention_has_the_kept_queries_and_the_text(keep: int):
    cache = cache_of("t5", Position(keep=keep))
    assert len(cache.cross.blocks) == len(cache.tail.blocks) == T5.num_decoder_layers
    for layer in cache.cross.blocks:
        assert layer.keys.shape == layer.values.shape == (4, T5.num_heads, keep + 16, T5.d_kv)
    assert cache.cross.valid.shape == (4, keep + 16)
    for layer in cache.tail.blocks:
        assert layer.keys.shape == (4, T5.num_heads, NEW + 1, T5.d_kv)
