"""VisToG, grouping only: each visual token joins one of a few learned tokens, and those go on.

Source: Huang et al., "Efficient Multi-modal Large Language Models via Visual Token Grouping",
arXiv 2411.17773; no code was released. The layer's form is GroupViT's (Xu et al., "GroupViT:
Semantic Segmentation Emerges from Text Supervision", arXiv 2202.11094).

    ℓ = (S W_q)(I W_k)ᵀ / √d          S: m learned semantic tokens, I: n visual ones
    each visual token → the group with its highest ℓ
    group = S + (mean of its tokens' I W_v) W_o

This is not the whole method: in the paper the semantic tokens pass through the vision encoder
before they group anything, with the patches; here they are the same for every image.

While the layer is trained, Gumbel noise is added to ℓ, and the gradient is the softmax's over
groups (straight-through); `training.vistog_grouping` does that. Our reading: ℓ is divided by √d, as
GroupViT does; a group that nobody joined is empty, where GroupViT has it go on as S alone.

Where a prompt's rows see different images, a group is for what the rows of its best token see, and
tokens join the best of those groups: else a row would read an image that it does not see.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from catp_jax.contract import Merge, Pruner, Reduction, Replace, Site, View
from catp_jax.pruning.learned import Learned
from catp_jax.pruning.scores import check_keep, rank
from catp_jax.struct import pytree, static

SMALL = 0.2  # what semantic tokens add to a mean at the start, in a token's own size
SHARP = 4.0  # the spread of ℓ at the start, of tokens whose channels spread by 1


@pytree
class Grouping:
    """The learned layer, for tokens of width d."""

    semantic: Float[Array, "m d"]
    w_q: Float[Array, "d d"]
    w_k: Float[Array, "d d"]
    w_v: Float[Array, "d d"]
    w_o: Float[Array, "d d"]

    @classmethod
    def around(cls, centres: Float[Array, "m d"]) -> "Grouping":
        """One that groups what lies in the same direction as one of these. A group begins as the
        mean of its tokens and a little of its own, so a model can read it before any training.
        """
        unit = jnp.eye(centres.shape[1])
        size = jnp.sqrt((centres**2).mean(axis=1, keepdims=True))
        semantic = SMALL * centres / size
        return cls(semantic=semantic, w_q=SHARP / SMALL * unit, w_k=unit, w_v=unit, w_o=unit)

    def logits(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b m n"]:
        """How much each token is drawn to each group, in float32."""
        width = self.semantic.shape[1]
        drawn = self.semantic @ self.w_q @ self.w_k.T * width**-0.5  # the few before the many
        return jnp.einsum("md,bnd->bmn", drawn, tokens.astype(jnp.float32))

    def group(
        self, tokens: Float[Array, "b n d"], joins: Float[Array, "b m n"]
    ) -> Float[Array, "b m d"]:
        """The groups' tokens, of ones at what joins them; `semantic` alone where nothing does."""
        number = joins.sum(axis=2, keepdims=True)
        total = jnp.einsum("bmn,bnd->bmd", joins, tokens.astype(jnp.float32))
        mean = total / jnp.where(number > 0.5, number, 1)
        return self.semantic[None] + mean @ self.w_v @ self.w_o  # the mean of I W_v is that of I


@pytree
class VisToGGrouping(Pruner[tuple[()]]):
    """Puts `keep` groups in the place of visual tokens, as many as `grouping` has semantic tokens.

    `of_model` is the model that they were learned of, by its checksum. With a `limit` a sample's
    tokens join its first groups alone, so many of them; training prepares for none.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY, Site.CROSS)

    site: Site | None = static(default=None)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    of_model: str | None = static(default=None)
    grouping: Grouping

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep != (number := self.grouping.semantic.shape[0]):
            raise ValueError(
                f"this grouping was made for keep={number}, its number of semantic tokens; got "
                f"keep={self.keep}"
            )

    @classmethod
    def from_learned(cls, learned: Learned, keep: int, of: int) -> dict[str, Any]:
        """Its fields. Of several tokens there can be kept as many as there are groups."""
        grouping = Grouping(**{name: jnp.asarray(x) for name, x in learned.arrays.items()})
        number = grouping.semantic.shape[0]
        return {"grouping": grouping, "keep": keep if of > 1 else number}

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        return Reduction(tokens=self.grouped(view)), state

    def grouped(self, view: View, noise: PRNGKeyArray | None = None) -> Replace:
        """The groups. In training there is `noise`, and tokens' choices have a gradient.

        Raises ValueError for tokens of another width than the grouping's.
        """
        tokens, width = view.tokens, self.grouping.semantic.shape[1]
        if tokens is None or tokens.shape[2] != width:
            shown = "none" if tokens is None else f"some of width {tokens.shape[2]}"
            raise ValueError(
                f"this grouping was made for tokens of width {width}; the model shows {shown}"
            )
        logits = self.grouping.logits(tokens)
        may = self.may_join(view, logits)
        noisy = logits
        if noise is not None:
            noisy = logits + jax.random.gumbel(noise, logits.shape)
        noisy = jnp.where(may, noisy, jnp.finfo(jnp.float32).min)
        groups = jnp.where(may.any(axis=1), noisy.argmax(axis=1).astype(jnp.int32), -1)
        number = jnp.arange(self.keep, dtype=jnp.int32)[None, :, None]
        joins = (groups[:, None] == number).astype(jnp.float32)
        drawn = (logits * joins).sum(axis=1)
        if noise is not None:
            soft = jnp.where(may, jax.nn.softmax(noisy, axis=1), 0)
            joins += soft - jax.lax.stop_gradient(soft)
        merge = Merge.of(groups, rank(jnp.where(groups >= 0, drawn, -jnp.inf)), self.keep)
        return Replace.merged(merge, self.grouping.group(tokens, joins))

    def may_join(self, view: View, logits: Float[Array, "b m n"]) -> Bool[Array, "b m n"]:
        """Which groups are open to each token: to visual ones those of what the same rows see, and
        of a limited sample its first.
        """
        is_visual = (view.valid & (view.numbers >= 0))[:, None]
        best = jnp.where(is_visual, logits, -jnp.inf).argmax(axis=2).astype(jnp.int32)
        may = is_visual & seen_alike(view.sees, best)
        if self.limit is None:
            return may
        number = jnp.arange(self.keep, dtype=jnp.int32)[None]
        return may & (number < jnp.maximum(self.limit, 1)[:, None])[..., None]


def seen_alike(sees: Bool[Array, "b s n"], indices: Int[Array, "b k"]) -> Bool[Array, "b k n"]:
    """Whether the same rows see an entry as see the one at `indices`."""
    these = jnp.take_along_axis(sees, indices[:, None], axis=2)
    both = jnp.einsum(  # whole numbers: exact
        "bsk,bsn->bkn",
        these.astype(jnp.bfloat16),
        sees.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    one, other = (some.sum(axis=1, dtype=jnp.float32) for some in (these, sees))
    return (both == one[..., None]) & (both == other[:, None])
