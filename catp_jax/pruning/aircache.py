"""AirCache: each layer's visual tokens as judged by the few words that matter to the last one.

Source: Huang et al., "AirCache: Activating Inter-modal Relevancy KV Cache Compression for Efficient
Large Vision-Language Model Inference", arXiv 2503.23956: the elite observation window and the
budget by layer. No code was released; followed are its formulas.

    what is in the picture ?        attention of the last word to the text
    .1   .0 .0 .0  .45     .45      alpha = .9: "picture" and "?" observe

Words that have at least `alpha` times the most attention of the last word, among the text alone,
are the window. A visual token's score is the attention that it receives from them on average, where
they see visual tokens and each other. Layers differ in how much they look (strength: the sum of the
scores) and in how few tokens they look at (skewness of the scores). A layer's share is
½ (strength + skewness), each in terms of its mean over the layers, times `share`.

Our reading: heads are averaged, so that they share the window and the tokens; a word observes what
it sees in the layer. Where a layer attends to visual tokens alone there is no attention among text:
every row observes, and the strength is 1. A method sees one layer at a time, so the means over the
layers are given, `strength` and `skewness`, as an earlier run had them: `Found` reports both of
each layer. Without them all layers keep alike. Arrays have room for `keep` in every layer: what a
smaller share leaves empty is not attended to, but takes its bytes.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import (
    attention_received,
    check_keep,
    evidence_of,
    keep_visual,
    last_row_attention,
)
from catp_jax.struct import pytree, replace, static


@pytree
class Found:
    """How a layer looks at each sample, how many tokens it wants, and how many have no room."""

    strength: Float[Array, " b"]
    skewness: Float[Array, " b"]
    wanted: Int[Array, " b"]
    overflow: Int[Array, " b"]


@pytree
class AirCache(Pruner[Found]):
    """Keeps in each layer the visual tokens that its most telling words attend to: `keep` of them,
    or of that room `share` in a layer of mean `strength` and `skewness`. `limit` leaves less room
    to a sample.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)

    site: Site = static(default=Site.CACHE)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    alpha: float = 0.9
    share: float = 0.5
    strength: float | None = None
    skewness: float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("alpha", "share"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value <= 1:
                raise ValueError(f"AirCache wants {name} above 0 and at most 1, got {value}")
        if (self.strength is None) != (self.skewness is None):
            raise ValueError("AirCache wants the means of strength and of skewness, or neither")
        for name in ("strength", "skewness"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"AirCache wants a mean {name} above 0, got {value}")

    def start(self, view: View) -> Found:
        none = jnp.zeros(view.valid.shape[0], jnp.int32)
        flat = jnp.zeros(none.shape, jnp.float32)
        return Found(strength=flat, skewness=flat, wanted=none, overflow=none)

    def __call__(self, view: View, state: Found) -> tuple[Reduction, Found]:
        if not view.num_visual:  # a layer that reads text alone
            return Reduction(), state
        score = self.score(view)
        is_visual = view.valid & (view.numbers >= 0)
        strength = jnp.where(is_visual, score, 0).sum(axis=1)
        skewness = skewness_of(score, is_visual)
        there = is_visual.sum(axis=1, dtype=jnp.int32)
        room = jnp.minimum(there, self.keep)
        room = room if self.limit is None else jnp.minimum(room, self.limit)
        wanted = room
        if self.strength is not None and self.skewness is not None:
            part = (strength / self.strength + skewness / self.skewness) / 2 * self.share
            wanted = jnp.round(room.astype(jnp.float32) * part).astype(jnp.int32)
            wanted = jnp.clip(wanted, 1, there)
        overflow = jnp.maximum(wanted - room, 0)
        found = Found(strength=strength, skewness=skewness, wanted=wanted, overflow=overflow)
        keep = keep_visual(view, self.keep, score, jnp.minimum(wanted, room))
        return Reduction(tokens=keep), found

    def score(self, view: View) -> Float[Array, "b n"]:
        """Attention from the window, on average over its words and the heads."""
        shown = evidence_of(view)
        queries, columns = shown.queries, view.valid & (view.numbers >= 0)
        sees = view.sees & columns[:, None]  # no row observes what new tokens cannot read
        text = view.valid.shape[1] - view.num_visual
        if text:  # the last rows are the text's
            window = self.window(view)
            sees = view.sees & (columns | window)[:, None]
            queries, sees = queries[:, -text:], sees[:, -text:] & window[:, -text:, None]
        observers = sees.any(axis=2).sum(axis=1, dtype=jnp.int32, keepdims=True)
        received = attention_received(queries, shown.keys, sees).mean(axis=1)
        return received / jnp.maximum(observers, 1).astype(jnp.float32)

    def window(self, view: View) -> Bool[Array, "b n"]:
        """The words that observe."""
        is_text = view.valid & (view.numbers < 0)
        among = replace(view, sees=view.sees & is_text[:, None])
        weights = last_row_attention(among).mean(axis=1)
        most = weights.max(axis=1, keepdims=True)
        return is_text & (weights >= self.alpha * most)


def skewness_of(scores: Float[Array, "b n"], among: Bool[Array, "b n"]) -> Float[Array, " b"]:
    """The sample skewness n / ((n-1)(n-2)) Σ z³; 0 of fewer than three, and where all are equal."""
    number = among.sum(axis=1, dtype=jnp.int32, keepdims=True).astype(jnp.float32)
    mean = jnp.where(among, scores, 0).sum(axis=1, keepdims=True) / jnp.maximum(number, 1)
    away = jnp.where(among, scores - mean, 0)
    variance = jnp.square(away).sum(axis=1, keepdims=True) / jnp.maximum(number - 1, 1)
    z = away / jnp.sqrt(jnp.where(variance > 0, variance, 1))
    factor = number / jnp.maximum((number - 1) * (number - 2), 1)
    return jnp.where(number > 2, factor * (z**3).sum(axis=1, keepdims=True), 0)[:, 0]
