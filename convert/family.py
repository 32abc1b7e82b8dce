"""What conversion has to know of a kind of model; `families` lists those there are."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from convert.rules import Ignore, Match, Matching, Rule, Shape, Twin, match, places

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "_forward_module.", "pretrained_model.")
"""What peft, torch's parallel and compiled modules, Lightning and TRL put before every name."""


def wrapper(names: Iterable[str]) -> str:
    """What stands before all of the names and belongs to no model: wrappers, one in another."""
    names, prefix = list(names), ""
    while names and (
        found := [w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)]
    ):
        prefix += found[0]
    return prefix


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of naming the tensors; `prefixes` are pairs of its own prefix and the hub's."""

    name: str
    prefixes: tuple[tuple[str, str], ...]

    def to_hub(self, name: str) -> str:
        """The hub's name of one of this layout's tensors."""
        for own, hub in self.prefixes:
            if name.startswith(own):
                return hub + name.removeprefix(own)
        return name

    def from_hub(self, name: str) -> str:
        """The inverse of `to_hub`."""
        for own, hub in self.prefixes:
            if name.startswith(hub):
                return own + name.removeprefix(hub)
        return name


HUB = Layout("hub", ())
"""The names as they are on the hub, in which the tables of all families are written."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`. Tensors are named here as on the hub.

    `read` and `write` go from a config.json to one of `configs` and back. `detect` tells the layout
    from the tensors' names. `head` is a tensor that may be the `twins`' twin or have values of its
    own; then `with_own_head` corrects what config.json said. Parameters whose name begins with one
    of `float32` stay float32 when others are cast, those that end with one of `not_float16` when
    others are cast to that.
    """

    model_type: str
    configs: tuple[type, ...]
    read: Callable[[dict[str, Any], str], Any]
    write: Callable[[Any, dict[str, Any]], dict[str, Any]]
    build: Callable[[Any, nnx.Rngs], nnx.Module]
    rules: Callable[[Any], Sequence[Rule]]
    ignores: Sequence[Ignore]
    hints: Mapping[str, str]
    layouts: Mapping[str, Layout]
    detect: Callable[[Iterable[str], str], Layout]
    twins: Sequence[Twin] = ()
    head: str | None = None
    with_own_head: Callable[[Any], Any] = lambda config: config
    float32: tuple[str, ...] = ()
    not_float16: tuple[str, ...] = ()

    def match(
        self,
        tensors: Mapping[str, Shape],
        parameters: Mapping[str, Shape],
        config: Any,
        where: str,
    ) -> tuple[Layout, Matching]:
        """Pairs the tensors of a checkpoint, named in any layout, with a model's parameters.

        The matching has the tensors' own names. Raises ValueError with all that does not fit.
        """
        if adapted := next((name for name in tensors if ".lora_" in name), None):
            raise ValueError(
                f"{where} has tensors of an adapter among those of the model ({adapted}); save it "
                "with peft's merge_and_unload(), or the adapter apart with save_pretrained"
            )
        bare = bare_names(tensors)
        layout = self.detect(bare, where)
        own = {layout.to_hub(name): whole for name, whole in bare.items()}
        if len(own) != len(tensors):
            raise ValueError(f"{where} has tensors whose names mean the same; keep one of each")
        found = match(
            {hub: tensors[name] for hub, name in own.items()},
            parameters,
            self.rules(config),
            self.ignores,
            where,
            self.hints,
            self.twins,
        )

        def named(matches: list[Match]) -> list[Match]:
            return [dataclasses.replace(one, source=own[one.source]) for one in matches]

        ignored = {own[hub]: reason for hub, reason in found.ignored.items()}
        return layout, Matching(named(found.matches), named(found.twins), ignored)

    def places(
        self, names: Iterable[str], parameters: Iterable[str], config: Any, layout: Layout
    ) -> dict[str, Match]:
        """Where tensors of these names go, by the names alone; not those that go nowhere."""
        own = {layout.to_hub(name): whole for name, whole in bare_names(names).items()}
        found = places(own, set(parameters), self.rules(config), self.twins)
        return {own[hub]: dataclasses.replace(one, source=own[hub]) for hub, one in found.items()}

    def relatives(self, head: str) -> set[str]:
        """The names of tensors that have the same values as the head if it is tied."""
        of = {twin.of for twin in self.twins if twin.source == head}
        return of | {twin.source for twin in self.twins if twin.of in of} - {head}


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """The names by what they are without their wrapper."""
    names = list(names)
    prefix = wrapper(names)
    return {name.removeprefix(prefix): name for name in names}
