"""MINT: what a model says of the key visual tokens, in contrast to what it says of all of them.

                 ┌─ back, pruned ── masked logits, cache ─┐
    inputs ─ front                                        ├─ contrasted logits ─ any decoding
                 └─ back, whole ─── full logits, cache ───┘

    contrasted = (1 + α) · masked - α · full     where p(token) ≥ β · max p, by the masked view

Source: Wang, Yang and Zhou, "MINT: Mitigating Hallucinations in Large Vision-Language Models via
Token Reduction", arXiv 2502.00717. Only its abstract is known here: attention to irrelevant image
tokens is masked, and contrastive decoding pushes the model towards the key ones. All else is our
reading:

- The key tokens are FastV's (`rows="last"`, 25 %): those that the prompt's last row attends to in a
  shallow layer. From there on the masked view has no others. They are chosen once, in the prefill;
  any other pruners do as well, and one at READ chooses anew in every step.
- The masked view is the one that counts, and the full one is what it is pushed away from. The
  formula is that of Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models
  through Visual Contrastive Decoding", arXiv 2311.16922, with its α of 1 and β of 0.1.
- Implausible tokens are not at -inf but `FAR` below, in the masked view's order: no decoding writes
  one while it may write another. So rules that forbid all plausible tokens leave something to
  write, there are as many beams as were asked for, and every given answer has a likelihood.

This is made for truth, not for speed: a step computes what the pruned model's and the unpruned
one's do together, and there are the caches of both. In the prefill they share what comes before any
pruning.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from catp_jax.contract import Room, Select, Site, keep_all
from catp_jax.struct import AnyArray, pytree

FAR = 1.0e4
"""Between the lowest plausible logit and implausible ones: no chance at temperatures below 400."""


@pytree
class Caches:
    """Those of both views, which hold the same new tokens."""

    masked: Any
    full: Any

    def spread(self, rows: int) -> "Caches":
        """So many rows a prompt."""
        return Caches(masked=self.masked.spread(rows), full=self.full.spread(rows))

    def reorder(self, parents: Int[Array, " r"]) -> "Caches":
        """Row i goes on from what row `parents[i]` wrote; both have the same prompt."""
        return Caches(masked=self.masked.reorder(parents), full=self.full.reorder(parents))


@pytree
class Contrasted:
    """A model that stands for `model`: pruned and unpruned at once, with contrasted logits in
    float32. Numbers are leaves: others compile nothing. `contrasted` makes and checks it.
    """

    model: Any
    alpha: Float[AnyArray, ""]
    beta: Float[AnyArray, ""]

    def __repr__(self) -> str:
        return f"Contrasted({self.summary})"

    @property
    def summary(self) -> str:
        """The model's, and how it is contrasted."""
        return f"{self.model.summary}, alpha {self.alpha:.3g}, beta {self.beta:.3g}"

    @property
    def arrays(self) -> Any:
        """The parameters."""
        return self.model.arrays

    @property
    def sites(self) -> frozenset[Site]:
        """See the model's own."""
        return self.model.sites

    def thaw(self) -> Any:
        """The model itself, without contrast."""
        return self.model.thaw()

    def front(self, inputs: Any) -> Any:
        """See the model's own; it serves both views."""
        return self.model.front(inputs)

    def back(
        self, front: Any, select: Select, room: Room
    ) -> tuple[Float[Array, "b vocab"], Caches]:
        """The rest of the prefill twice, as `select` prunes and unpruned."""
        masked, of_masked = self.model.back(front, select, room)
        full, of_full = self.model.back(front, keep_all, room.whole)
        logits = contrast(masked, full, self.alpha, self.beta)
        return logits, Caches(masked=of_masked, full=of_full)

    def step(
        self, tokens: Int[Array, " r"], cache: Caches, select: Select
    ) -> tuple[Float[Array, "r vocab"], Caches]:
        """Both views read the same tokens; `select` chooses what the masked one reads."""
        masked, of_masked = self.model.step(tokens, cache.masked, select)
        full, of_full = self.model.step(tokens, cache.full, keep_all)
        logits = contrast(masked, full, self.alpha, self.beta)
        return logits, Caches(masked=of_masked, full=of_full)


def contrast(
    masked: Float[Array, "r vocab"],
    full: Float[Array, "r vocab"],
    alpha: Float[AnyArray, ""],
    beta: Float[AnyArray, ""],
) -> Float[Array, "r vocab"]:
    """Contrasted logits where `masked` finds a token plausible, and `FAR` below where not.

    contrast([[3, 2, -9]], [[3, 1, 9]], 1, .1)  # [[3, 3, 3 - FAR - 12]]
    """
    masked, full = masked.astype(jnp.float32), full.astype(jnp.float32)
    highest = masked.max(axis=-1, keepdims=True)
    is_plausible = masked >= highest + jnp.log(beta)  # of logits, what the docstring says of p
    logits = masked + alpha * (masked - full)  # nothing is rounded where both are the same
    lowest = jnp.where(is_plausible, logits, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(is_plausible, logits, lowest - FAR + masked - highest)


def contrasted(model: Any, alpha: float = 1.0, beta: float = 0.1) -> Contrasted:
    """A model (frozen, to be quick) whose answers are its pruned view's in contrast to its whole
    one's. With `alpha` 0 there is nothing but the cut, with `beta` 0 no cut.

        generate(contrasted(model), (FastV(keep=64),), inputs, sampling(1), stop)

    Raises ValueError for numbers out of range.
    """
    check_contrast(alpha, beta)
    return Contrasted(
        model=model, alpha=np.asarray(alpha, np.float32), beta=np.asarray(beta, np.float32)
    )


def check_contrast(alpha: float | None, beta: float | None = None) -> None:
    """Raises ValueError for numbers out of range, and for a cut without a contrast."""
    if alpha is None:
        if beta is not None:
            raise ValueError("what is plausible counts in a contrast alone; give contrast, too")
        return
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is 0 (no contrast) or above, got {alpha}")
    if beta is not None and not 0 <= beta <= 1:
        raise ValueError(f"beta lies between 0 (all tokens are plausible) and 1, got {beta}")
