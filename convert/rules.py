"""One table says where each tensor of a checkpoint goes; this file expands, matches and checks it.

    Rule("vision.layers.*.{q,k}_proj.weight", "vit.layers.*.{q,k}_proj.kernel", TRANSPOSE)

`*` is a number, the same in both names; `{q,k}` stands for one rule per word. Every tensor has to
find exactly one rule or `Ignore`, and every parameter of the model exactly one tensor of the shape
it wants, besides its `Twin`s. Whatever does not fit is collected, and one error lists it all.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np

LISTED = 20  # names of one kind that an error shows

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A named change of layout. Both ways return a view where NumPy can, so nothing is read yet."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def source_shape(self, target: Shape) -> Shape:
        """The shape a tensor must have in the checkpoint to fill a parameter of shape `target`."""
        return self.inverse(np.broadcast_to(np.int8(0), target)).shape


IDENTITY = Transform("as it is", lambda x: x, lambda x: x)
TRANSPOSE = Transform(
    "transposed", lambda x: x.T, lambda x: x.T
)  # torch: [out, in]; ours: [in, out]


def patches(channels: int) -> Transform:
    """A convolution over square patches, [out, channels, side, side] in torch, as a matrix."""

    def inverse(x: np.ndarray) -> np.ndarray:
        side = round((x.shape[0] // channels) ** 0.5)
        return x.T.reshape(x.shape[1], channels, side, side)

    return Transform("flattened, transposed", lambda x: x.reshape(x.shape[0], -1).T, inverse)


# one projection for queries, keys and values; torch: [3 out, in], ours: [in, 3, out]
THREE = Transform(
    "split in three, transposed",
    lambda x: x.reshape(3, -1, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
)
THREE_BIASES = Transform("split in three", lambda x: x.reshape(3, -1), lambda x: x.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors whose name fits `source` fill the parameters that `target` names."""

    source: str
    target: str
    transform: Transform = IDENTITY


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Tensors whose name fits `source` are left out, because of `reason`."""

    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Twin:
    """A second name, `source`, for the tensor named `of`, in models that share it.

    Checkpoints hold it under one name or both. If `source` has a parameter of its own, it is no
    twin there.
    """

    source: str
    of: str


@dataclasses.dataclass(frozen=True)
class Match:
    """One tensor (`source`) and the parameter (`target`) it fills."""

    source: str
    target: str
    transform: Transform


def expand(rules: Sequence[Rule]) -> list[Rule]:
    """The rules without braces: one for each word between them."""
    done, todo = [], list(rules)
    while todo:
        rule = todo.pop(0)
        braces = re.search(r"\{([\w,]+)\}", rule.source)
        if braces is None:
            done.append(rule)
            continue
        for word in braces[1].split(","):
            todo.append(
                dataclasses.replace(
                    rule,
                    source=rule.source.replace(braces[0], word, 1),
                    target=rule.target.replace(braces[0], word, 1),
                )
            )
    return done


@dataclasses.dataclass(frozen=True)
class Matching:
    """Where the tensors of a checkpoint go: one to each parameter, `twins` once more to some.

    `ignored` are the names of those left out, with the reason.
    """

    matches: list[Match]
    twins: list[Match]
    ignored: dict[str, str]


def match(
    tensors: Mapping[str, Shape],
    parameters: Mapping[str, Shape],
    rules: Sequence[Rule],
    ignores: Sequence[Ignore],
    where: str,
    hints: Mapping[str, str] | None = None,
    twins: Sequence[Twin] = (),
) -> Matching:
    """Pairs every tensor with its parameter.

    `where` names the checkpoint in the error; `hints` says, for the name of a tensor, what it may
    mean that it is missing. Raises ValueError with all that does not fit.
    """
    rules = expand(rules)
    matches: dict[str, list[Match]] = {name: [] for name in parameters}
    again: dict[str, list[Match]] = {name: [] for name in parameters}
    ignored: dict[str, str] = {}
    unknown, doubled = [], []
    for name in tensors:
        reasons = [ignore.reason for ignore in ignores if _numbers(ignore.source, name) is not None]
        found = _by_rules(name, rules)
        if len(found) + len(reasons) > 1:
            ways = [f"to {one.target}" for one in found] + [f"ignored: {r}" for r in reasons]
            doubled.append(f"{name} ({'; '.join(ways)})")
        elif reasons:
            ignored[name] = reasons[0]
        elif found and found[0].target in parameters:
            matches[found[0].target].append(found[0])
        elif (twin := _by_twins(name, parameters, rules, twins)) is not None:
            again[twin.target].append(twin)
        else:
            unknown.append(name)

    missing, misshaped = [], []
    names = {one.target: one.source for one in sources(parameters, rules)}
    for target, shape in parameters.items():
        if not matches[target] and again[target]:
            matches[target].append(again[target].pop(0))
        if not matches[target]:
            missing.append(names.get(target, target))
        elif len(several := matches[target]) > 1:
            doubled.append(f"{target} (from {' and '.join(one.source for one in several)})")
        else:
            for one in (*matches[target], *again[target]):
                wanted = one.transform.source_shape(shape)
                if tensors[one.source] != wanted:
                    misshaped.append(f"{one.source} (has {tensors[one.source]}, wanted {wanted})")

    problems = {
        "missing": missing,
        "unknown (no rule, or no such place with this config.json)": unknown,
        "matched twice": doubled,
        "of another shape than config.json says": misshaped,
    }
    if any(problems.values()):
        lines = [
            f"  {len(found)} {kind}: {listed(found)}" for kind, found in problems.items() if found
        ]
        lines += [f"  {hint}" for name, hint in (hints or {}).items() if name in missing]
        raise ValueError(
            f"{where}: the tensors do not fit the model that config.json describes; check that "
            "both are of the same checkpoint\n" + "\n".join(lines)
        )
    return Matching(
        [one for (one,) in matches.values()],
        [one for several in again.values() for one in several],
        ignored,
    )


def places(
    names: Iterable[str], parameters: Container[str], rules: Sequence[Rule], twins: Sequence[Twin]
) -> dict[str, Match]:
    """Where tensors of these names go, by the names alone; those that go nowhere are left out."""
    rules, found = expand(rules), {}
    for name in names:
        own = [one for one in _by_rules(name, rules) if one.target in parameters]
        one = own[0] if own else _by_twins(name, parameters, rules, twins)
        if one is not None:
            found[name] = one
    return found


def sources(parameters: Iterable[str], rules: Sequence[Rule]) -> list[Match]:
    """The tensors that fill the given parameters, by the rules alone; in the parameters' order."""
    rules = expand(rules)
    return [
        Match(_fill(rule.source, numbers), target, rule.transform)
        for target in parameters
        for rule in rules
        if (numbers := _numbers(rule.target, target)) is not None
    ]


def _by_rules(name: str, rules: Sequence[Rule]) -> list[Match]:
    """Where the (expanded) rules put a tensor of this name."""
    return [
        Match(name, _fill(rule.target, numbers), rule.transform)
        for rule in rules
        if (numbers := _numbers(rule.source, name)) is not None
    ]


def _by_twins(
    name: str, parameters: Container[str], rules: Sequence[Rule], twins: Sequence[Twin]
) -> Match | None:
    """Where a tensor goes whose name is a second one for another."""
    for twin in twins:
        if twin.source == name:
            for one in _by_rules(twin.of, rules):
                if one.target in parameters:
                    return dataclasses.replace(one, source=name)
    return None


def _numbers(pattern: str, name: str) -> tuple[str, ...] | None:
    """What stands for each `*` of a pattern; None if the name does not fit."""
    fit = _compile(pattern).fullmatch(name)
    return None if fit is None else fit.groups()


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))


def _fill(pattern: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def listed(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    more = f", … and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
