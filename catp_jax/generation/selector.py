"""What answers a model's views: the pruners that work there, one after the other.

It is the same in the prefill and in every step; what has to last between two steps is the `states`
of the pruners.
"""

from typing import Any

from catp_jax.contract import Keep, Pruners, Reduction, Site, View, is_at, run_pruners, settle
from catp_jax.struct import pytree, static


@pytree
class Selection:
    """What pruning left, all in numbers of a sample's visual tokens before any pruning.

    `kept`: of those that go through the language model (None: all stay); `cached`: in the caches of
    layers that were pruned apart. `merged`: some of those are means, each named by the token that
    stands for its group. `states` has the last state of every pruner, in their order; None
    for one that had nothing to look at, one by layer where it works in every layer.
    """

    merged: bool = static(default=False)
    kept: Keep | None
    cached: dict[int, Keep]
    states: tuple[Any, ...]

    @classmethod
    def start(cls, pruners: Pruners) -> "Selection":
        """Before any view."""
        return cls(kept=None, cached={}, states=(None,) * len(pruners))


class Selector:
    """Answers a model's views with the pruners that work there, and notes what they left.

    `noted` is what an earlier one, with the same pruners, left. `chosen` is the answer to the first
    view if there is one already (`select_tokens`). In a prefill the states of pruners at READ
    start, and a step (`is_step`) goes on with them.
    """

    def __init__(
        self,
        pruners: Pruners,
        sites: frozenset[Site],
        noted: Selection | None = None,
        chosen: Keep | None = None,
        is_step: bool = False,
    ):
        noted = Selection.start(pruners) if noted is None else noted
        self.pruners, self.chosen, self.is_step = settle(pruners, sites), chosen, is_step
        self.kept, self.cached, self.states = noted.kept, {**noted.cached}, [*noted.states]
        self.merged = noted.merged
        self.was_shown = any(state is not None for state in noted.states)

    def __call__(self, view: View | None) -> Reduction:
        if view is None:
            return Reduction(tokens=self.chosen)
        self.was_shown |= view.num_visual > 0
        mine = [number for number, pruner in enumerate(self.pruners) if is_at(pruner, view)]
        if not mine:
            return Reduction()
        if view.site is Site.READ:
            return Reduction(tokens=self._read(mine[0], view))
        reduction, states = run_pruners(tuple(self.pruners[number] for number in mine), view)
        for number, state in zip(mine, states, strict=True):
            keeps_state = view.site is Site.CACHE
            self.states[number] = self._with(number, view, state) if keeps_state else state
        if reduction.tokens is not None:
            self._note(view, reduction.tokens)
        return reduction

    def _read(self, number: int, view: View) -> Keep | None:
        pruner, states = self.pruners[number], self.states[number] or {}
        name = type(pruner).__name__
        if view.valid.ndim == 3:
            raise ValueError(
                f"{name} works at READ, and cannot where another method keeps other tokens for "
                "each head; leave one out"
            )
        if view.attention is None:
            raise ValueError(
                f"{name} works at READ, and cannot where another method leaves out channels; "
                "leave one out"
            )
        if not self.is_step:
            keep, state = None, pruner.start(view)
        elif view.layer in states:
            reduction, (state,) = run_pruners((pruner,), view, [states[view.layer]])
            if (keep := reduction.tokens) is not None and keep.merges:
                raise ValueError(f"{name} merges tokens, which a step cannot (site READ)")
        else:
            raise ValueError(
                f"{name} has no state; give step the selection.states of a prefill with the same "
                "pruners"
            )
        self.states[number] = self._with(number, view, state)
        return keep

    def _with(self, number: int, view: View, state: Any) -> dict[int, Any]:
        """A pruner's states by layer, this one's among them."""
        return {**(self.states[number] or {}), view.layer: state}

    def _note(self, view: View, keep: Keep) -> None:
        """The visual tokens that are left, in terms of those before any pruning."""
        self.merged |= keep.merges
        room = keep.indices.shape[-1]
        if not keep.is_by_head:  # else a head may have dropped text
            room -= view.valid.shape[-1] - view.num_visual
        numbers = keep.apply(view.numbers)[..., :room]
        left = Keep(indices=numbers, valid=keep.valid[..., :room] & (numbers >= 0))
        if view.site is Site.CACHE:
            self.cached[view.layer] = left
        else:
            self.kept = left

    def check(self) -> None:
        """Raises ValueError if a pruner was never asked, since it works where no view was shown.

        If no view had visual tokens, there was nothing to prune.
        """
        for pruner, state in zip(self.pruners, self.states, strict=True):
            if state is None and self.was_shown:
                where, hint = pruner.site.value, ""
                if pruner.site is Site.LAYER:
                    where = f"layer {pruner.layer}"
                    hint = "; layers are counted from 0, and the first to prune in front of is 1"
                name = type(pruner).__name__
                raise ValueError(f"{name} works at {where}, which this model does not have{hint}")

    @property
    def selection(self) -> Selection:
        """What was noted."""
        return Selection(
            merged=self.merged, kept=self.kept, cached=self.cached, states=tuple(self.states)
        )
