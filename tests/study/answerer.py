"""A small model for studies: eight visual tokens a prompt, which vote for one of four answers."""

import copy
import dataclasses
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

from catp_jax.contract import Site, View
from catp_jax.generation import generate as programs
from catp_jax.generation.options import Options
from catp_jax.struct import pytree
from catp_jax.study.records import Answers, Cost, Result, SettingCost
from catp_jax.study.tasks import Example

WORDS = ("yes", "no", "red", "2")
TOKENS = 8
POSITIONS = 50  # most new tokens


def examples(number, image_of=lambda n: n // 2):
    """Questions, two about each image, and answers that the whole model mostly gets right."""
    out = []
    for n in range(number):
        image, question = Path(f"image-{image_of(n)}.png"), f"question {n}?"
        votes = visual_tokens(image, question).sum(axis=0)
        answer = WORDS[int(votes.argmax())] if n % 5 else "none of these"
        out.append(Example(image, question, answer, f"id-{n}", image_of(n)))
    return out


def visual_tokens(image, prompt):
    """A prompt's tokens [8, 4], each a vote: made of the names alone."""
    seed = zlib.crc32(f"{image}{prompt}".encode())
    return np.random.default_rng(seed).normal(size=(TOKENS, len(WORDS))).astype(np.float32)


@pytree
class Front:
    view: View


@pytree
class Cache:
    """A prompt's tokens, and how many each row has written."""

    tokens: Any
    next: Any

    def spread(self, rows):
        return Cache(tokens=self.tokens, next=jnp.repeat(self.next, rows))


@pytree
class Network:
    """Adds up the visual tokens that are left; each new token takes a slot of the cache."""

    scale: Any

    sites = frozenset({Site.ENTRY})

    def front(self, inputs):
        tokens = inputs * self.scale
        batch, count = tokens.shape[:2]
        numbers = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
        valid = jnp.ones((batch, count), bool)
        view = View(
            site=Site.ENTRY,
            layer=0,
            num_visual=count,
            tokens=tokens,
            attention=None,
            values=None,
            evidence=None,
            numbers=numbers,
            valid=valid,
            sees=valid[:, None],
        )
        return Front(view=view)

    def back(self, front, select, room):
        tokens = front.view.tokens
        if (keep := select(front.view).tokens) is not None:
            tokens = jnp.where(keep.valid[..., None], keep.apply(tokens), 0.0)
        cache = jnp.pad(tokens, ((0, 0), (0, room.new), (0, 0)))
        every = jnp.ones((len(tokens), tokens.shape[1]))
        summed = jnp.einsum("bn,bnd->bd", every, tokens)
        return summed, Cache(tokens=cache, next=jnp.zeros(len(tokens), jnp.int32))

    def step(self, tokens, cache, select):
        return cache.tokens.sum(axis=1), Cache(tokens=cache.tokens, next=cache.next + 1)


class Words:
    """A tokenizer that has a token for every word but one."""

    unk_token_id = 0

    def __call__(self, words, add_special_tokens):
        return {"input_ids": [[0] if word == "okapi" else [1] for word in words]}


class Tiny:
    """The model; `batches` notes the prompts of every batch that was answered, `encodings` those
    whose images were encoded.
    """

    dtype, sites = jnp.float32, frozenset({Site.ENTRY})

    def __init__(self, kind="tiny"):
        self.network = Network(scale=jnp.ones(()))
        self.kind, self.batches, self.encodings = kind, [], []
        self.share = 1.0

    def describe(self):
        return {"kind": self.kind, "visual_tokens": TOKENS}

    def seeing(self, image_scale=1.0, tiles=None):
        """Of an image with half the pixels a side half the tokens are left, and so on."""
        model = copy.copy(self)
        model.share = image_scale if tiles is None else tiles / 4
        return model

    def prepare(self, images, prompts, begun):
        count = int(TOKENS * self.share)
        tokens = [
            visual_tokens(image, prompt)[:count]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        available = (count,) * len(prompts)
        return SimpleNamespace(
            prompts=list(prompts),
            available=available,
            most=TOKENS,
            inputs=jnp.asarray(np.stack(tokens)),
        )

    def late(self, packed: Any) -> Any:
        raise NotImplementedError

    def encode(self, packed):
        self.encodings.append(packed.prompts)
        encoded = programs.encode(self.network, packed.inputs)
        return SimpleNamespace(**{**vars(packed), "encoded": encoded})

    def generate_packed(
        self,
        packed,
        pruners,
        **options,
    ):
        max_new_tokens = Options(**options).max_new_tokens
        if max_new_tokens > POSITIONS:
            raise ValueError(f"{max_new_tokens} new tokens do not fit")
        self.batches.append((packed.prompts, tuple(pruners)))
        out = programs.prefill(
            self.network, tuple(pruners), packed.encoded, new_slots=max_new_tokens
        )
        kept = None
        if pruners:
            chosen = out.selection.kept
            kept = [
                SimpleNamespace(number=np.asarray(indices)[np.asarray(valid)])
                for indices, valid in zip(chosen.indices, chosen.valid, strict=True)
            ]
        logits = np.asarray(out.logits)
        return SimpleNamespace(
            text=[WORDS[best] for best in logits.argmax(axis=1)],
            logits=logits,
            available=packed.available,
            kept=kept,
            is_merged=out.selection.merged,
            cached=out.selection.cached,
        )

    tokenizer = Words()

    @property
    def reader(self):
        return self

    def grid(self, packed, row):
        return (1, 1, 2, 4)

    def framed(self, image, boxes):
        return list(boxes)

    def picture(self, image):
        return np.linspace(0, 1, 20 * 24 * 3).reshape(20, 24, 3)

    def needed(self, network, packed, images, boxes):
        """A box's left edge times eight is the token that it is about."""
        out = np.zeros((len(images), TOKENS), np.float32)
        for row, some in enumerate(boxes):
            out[row, [int(TOKENS * box[0]) for box in some]] = 1.0
        return list(out)

    def kept_map(self, network, packed, row, kept):
        grid = np.zeros(TOKENS)
        grid[kept.number] = 1.0
        return grid.reshape(2, 4)


def without_times(records):
    """Records of a study as they would be on any day."""
    return [_timeless(record) for record in records]


def _timeless(record):
    match record:
        case Answers():
            return dataclasses.replace(record, ms=None)
        case SettingCost():
            return dataclasses.replace(record, cost=_untimed(record.cost))
        case Result():
            plain = {"milliseconds": None, "spread": None, "cost": _untimed(record.cost)}
            return dataclasses.replace(record, **plain)
    return record


def _untimed(cost):
    return Cost(cache_bytes=cost.cache_bytes, prefill_flops=cost.prefill_flops)
