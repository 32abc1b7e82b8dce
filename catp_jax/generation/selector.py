"""What answers a model's views: the pruners that work there, one after the other.

It is the same in the prefill and in every step; what has to last between two steps is the `states`
of the pruners.
"""

from typing import Any

from catp_jax.contract import BY_LAYER, Keep, Pruners, Site, View, is_at, run_pruners, settle
from catp_jax.struct import pytree


@pytree
class Selection:
    """What pruning left, all in numbers of a sample's visual tokens before any pruning.

    `kept`: of those that go through the language model (None: all stay); `cached`: in the caches of
    layers that were pruned apart. `states` has the last state of every pruner, in their order; None
    for one that had nothing to look at, one by layer where it works in every layer.
    """

    kept: Keep | None
    cached: dict[int, Keep]
    states: tuple[Any, ...]

    @classmethod
    def start(cls, pruners: Pruners) -> "Selection":
        """Before any view."""
        return cls(kept=None, cached={}, states=(None,) * len(pruners))


class Selector:
    """Answers a model's views with the pruners that work there, and notes what they left.

    It goes on from what was `noted` of the views before. `chosen` is the answer to the first view
    if that was looked at before (`look`).
    """

    def __init__(
        self,
        pruners: Pruners,
        sites: frozenset[Site],
        noted: Selection | None = None,
        chosen: Keep | None = None,
    ):
        noted = Selection.start(pruners) if noted is None else noted
        self.pruners, self.chosen = settle(pruners, sites), chosen
        self.kept, self.cached, self.states = noted.kept, {**noted.cached}, [*noted.states]
        self.was_shown = any(state is not None for state in noted.states)

    def __call__(self, view: View | None) -> Keep | None:
        if view is None:
            return self.chosen
        self.was_shown |= view.num_visual > 0
        mine = [number for number, pruner in enumerate(self.pruners) if is_at(pruner, view)]
        if view.site is Site.CACHE:
            for number, pruner in enumerate(self.pruners):
                if pruner.site is Site.READ:
                    self._remember(number, view, pruner.start(view))
        if not mine:
            return None
        pruners, before = tuple(self.pruners[number] for number in mine), None
        if view.site is Site.READ:
            before = [self.states[number][view.layer] for number in mine]
        keep, states = run_pruners(pruners, view, before)
        for number, state in zip(mine, states, strict=True):
            self._remember(number, view, state)
        if keep is not None and view.site is not Site.READ:
            self._note(view, keep)
        return keep

    def _remember(self, number: int, view: View, state: Any) -> None:
        if view.site in BY_LAYER:
            self.states[number] = {**(self.states[number] or {}), view.layer: state}
        else:
            self.states[number] = state

    def _note(self, view: View, keep: Keep) -> None:
        """The visual tokens that are left, in terms of those before any pruning."""
        room = view.num_visual - (view.valid.shape[-1] - keep.indices.shape[-1])
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
                where = f"layer {pruner.layer}" if pruner.site is Site.LAYER else pruner.site.value
                raise ValueError(
                    f"{type(pruner).__name__} works at {where}, which this model does not have; "
                    "layers are counted from 0, and the first that can be pruned in front of is 1"
                )

    @property
    def selection(self) -> Selection:
        """What was noted."""
        return Selection(kept=self.kept, cached=self.cached, states=tuple(self.states))
