"""What conversion has to know of a kind of model; `families` lists those there are."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from convert.parts import Part
from convert.rules import Match, Names, Rule, tensor_of

WRAPPERS = (
    *("base_model.model.", "module.", "_orig_mod.", "_forward_module.", "pretrained_model."),
    "model.module.",
)
"""What peft, torch's parallel and compiled modules, Lightning and TRL put before every name."""


def wrapper_of(names: Iterable[str]) -> str:
    """What stands before all of the names and belongs to no model: wrappers, one in another."""
    names, prefix = list(names), ""
    while names and (
        found := [w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)]
    ):
        prefix += found[0]
    return prefix


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of naming the tensors: `prefixes` are pairs of its own prefix and the hub's, `wrapper`
    stands before every name.
    """

    name: str
    prefixes: tuple[tuple[str, str], ...] = ()
    wrapper: str = ""

    def to_hub(self, name: str) -> str:
        """The hub's name of one of this layout's tensors."""
        name = name.removeprefix(self.wrapper)
        for own, hub in self.prefixes:
            if name.startswith(own):
                return hub + name.removeprefix(own)
        return name

    def from_hub(self, name: str) -> str:
        """The inverse of `to_hub`."""
        for own, hub in self.prefixes:
            if name.startswith(hub):
                return self.wrapper + own + name.removeprefix(hub)
        return self.wrapper + name


HUB = Layout("hub")
"""The names as they are on the hub, in which all that a family says of tensors is written."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`. Tensors are named here as on the hub.

    `models` are by their configurations; `tables` read and write its kinds of config.json, of which
    the first is the usual one. `ours` is how a model's parameters are named, and `rules` say of
    these names, given the hub's prefixes, what does not go without saying; `twins`, `ignores` and
    `hints` are as in `Names`. `detect` tells the layout from the tensors' names. `head` is a tensor
    that may be a twin or have values of its own; then `with_own_head` corrects what config.json
    said. Parameters whose name begins with one of `float32` stay float32 when others are cast,
    those that end with one of `not_float16` when others are cast to that.
    """

    model_type: str
    models: Mapping[type, Callable[..., nnx.Module]]
    tables: Sequence[Part]
    rules: Callable[[Any], Sequence[Rule]]
    ignores: Mapping[str, str]
    hints: Mapping[str, str]
    detect: Callable[[Iterable[str], str], Layout]
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=lambda: {HUB.name: HUB})
    ours: Layout = HUB
    twins: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    head: str | None = None
    with_own_head: Callable[[Any], Any] = lambda config: config
    float32: tuple[str, ...] = ()
    not_float16: tuple[str, ...] = ()

    def layout_of(self, names: Iterable[str], where: str) -> Layout:
        """How a checkpoint, which `where` names in errors, names its tensors. Raises ValueError if
        it does so in several ways, or in none that is read.
        """
        names = list(names)
        if adapted := next((name for name in names if ".lora_" in name), None):
            raise ValueError(
                f"{where} has tensors of an adapter among those of the model ({adapted}); save it "
                "with peft's merge_and_unload(), or the adapter apart with save_pretrained"
            )
        wrapper = wrapper_of(names)
        layout = self.detect([name.removeprefix(wrapper) for name in names], where)
        return dataclasses.replace(layout, wrapper=wrapper)

    def names(self, parameters: Iterable[str], config: Any, layout: Layout = HUB) -> Names:
        """What the tensors for a model's parameters are called in a layout."""
        rules, own = self.rules(config), layout.from_hub
        found = [(name, tensor_of(self.ours.to_hub(name), rules)) for name in parameters]
        return Names(
            wanted={
                own(one.source): Match(own(one.source), name, one.transform) for name, one in found
            },
            twins={own(name): [*map(own, firsts)] for name, firsts in self.twins.items()},
            ignores={own(pattern): reason for pattern, reason in self.ignores.items()},
            hints={own(name): hint for name, hint in self.hints.items()},
        )

    def relatives(self, head: str) -> set[str]:
        """The names of tensors that have the same values as the head if it is tied."""
        firsts = {*self.twins.get(head, ())}
        seconds = {name for name, of in self.twins.items() if firsts.intersection(of)}
        return firsts | seconds - {head}
