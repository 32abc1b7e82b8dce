"""A language model that is a table, in transformers and in ours: what beam search does is fast to
try on it, thousands of steps a second.

The logits of the next token are `table[before, last]`, by the last two tokens. In transformers it
reads them off the whole text; ours keeps the one before the last in its cache, so that a beam that
goes on from another's cache gives other tokens.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from catp_jax.struct import pytree, replace


@pytree
class Start:
    """A prompt without an image."""

    tokens: Any
    view: None = None


@pytree
class Before:
    """The token before the last, of each row."""

    tokens: Array

    def spread(self, rows: int) -> "Before":
        """So many rows a prompt."""
        return replace(self, tokens=jnp.repeat(self.tokens, rows))

    def reorder(self, parents: Array) -> "Before":
        """Row i goes on from what row `parents[i]` wrote."""
        return replace(self, tokens=self.tokens[parents])


@pytree
class SecondOrder:
    """Ours."""

    table: Array

    sites = frozenset()

    def front(self, inputs: Array) -> Start:
        return Start(tokens=inputs)

    def back(self, front: Start, select: Any, room: Any) -> tuple[Array, Before]:
        before, last = front.tokens[:, 0], front.tokens[:, 1]
        return self.table[before, last], Before(tokens=last)

    def step(self, tokens: Array, cache: Before, select: Any) -> tuple[Array, Before]:
        return self.table[cache.tokens, tokens], Before(tokens=tokens)


class HfSecondOrder(PreTrainedModel, GenerationMixin):
    """transformers'."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, table: np.ndarray):
        super().__init__(PreTrainedConfig(vocab_size=len(table)))
        self.table = torch.nn.Parameter(torch.from_numpy(table.astype(np.float32)))

    def forward(self, input_ids: torch.Tensor, **ignored: Any) -> CausalLMOutput:
        before, last = input_ids[:, -2], input_ids[:, -1]
        return CausalLMOutput(logits=self.table[before, last][:, None])

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **ignored: Any) -> Any:
        return {"input_ids": input_ids}


def table(vocab: int, seed: int, ends: tuple[int, ...], push: float) -> np.ndarray:
    """Random logits, of `ends` higher by `push`."""
    logits = np.random.default_rng(seed).normal(size=(vocab, vocab, vocab)) * 1.5
    logits[:, :, list(ends)] += push
    return logits.astype(np.float32)


def ours(logits: np.ndarray) -> SecondOrder:
    """Our model of a table."""
    return SecondOrder(table=jnp.asarray(logits))
