"""One table says where each tensor of a checkpoint goes; this file expands, matches and checks it.

    Rule("vision.layers.*.{q,k}_proj.weight", "vit.layers.*.{q,k}_proj.kernel", TRANSPOSE)

`*` is a number, the same in both names; `{q,k}` stands for one rule per word. Every tensor has to
find exactly one rule or `Ignore`, and every parameter of the model exactly one tensor of the shape
it wants. Whatever does not fit is collected, and one error lists it all.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

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


def copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What a transform shows, as an array of its own, contiguous and of type `dtype`.

    A transposed matrix goes by blocks that fit a processor's cache: 4 × as fast as at one go.
    """
    out = np.empty(view.shape, dtype)
    if view.ndim != 2 or view.flags.c_contiguous:
        out[...] = view
        return out
    for start in range(0, view.shape[1], 128):
        block = slice(start, start + 128)
        out[:, block] = view[:, block]
    return out


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


def match(
    tensors: Mapping[str, Shape],
    parameters: Mapping[str, Shape],
    rules: Sequence[Rule],
    ignores: Sequence[Ignore],
    where: str,
    hints: Mapping[str, str] | None = None,
) -> tuple[list[Match], dict[str, str]]:
    """Pairs every tensor with its parameter: the matches, and the ignored names with the reason.

    `where` names the checkpoint in the error; `hints` says, for the name of a tensor, what it may
    mean that it is missing. Raises ValueError with all that does not fit.
    """
    rules = expand(rules)
    matches: dict[str, list[Match]] = {name: [] for name in parameters}
    ignored: dict[str, str] = {}
    unknown, doubled = [], []
    for name in tensors:
        reasons = [ignore.reason for ignore in ignores if _numbers(ignore.source, name) is not None]
        found = [
            Match(name, _fill(rule.target, numbers), rule.transform)
            for rule in rules
            if (numbers := _numbers(rule.source, name)) is not None
        ]
        if len(found) + len(reasons) > 1:
            ways = [f"to {one.target}" for one in found] + [f"ignored: {r}" for r in reasons]
            doubled.append(f"{name} ({'; '.join(ways)})")
        elif reasons:
            ignored[name] = reasons[0]
        elif found and found[0].target in parameters:
            matches[found[0].target].append(found[0])
        else:
            unknown.append(name)

    missing, misshaped = [], []
    names = {one.target: one.source for one in sources(parameters, rules)}
    for target, shape in parameters.items():
        match matches[target]:
            case []:
                missing.append(names.get(target, target))
            case [one]:
                wanted = one.transform.source_shape(shape)
                if tensors[one.source] != wanted:
                    misshaped.append(f"{one.source} (has {tensors[one.source]}, wanted {wanted})")
            case several:
                doubled.append(f"{target} (from {' and '.join(one.source for one in several)})")

    problems = {
        "missing": missing,
        "unknown (no rule, or no such place with this config.json)": unknown,
        "matched twice": doubled,
        "of another shape than config.json says": misshaped,
    }
    if any(problems.values()):
        lines = [
            f"  {len(found)} {kind}: {_list(found)}" for kind, found in problems.items() if found
        ]
        lines += [f"  {hint}" for name, hint in (hints or {}).items() if name in missing]
        raise ValueError(
            f"{where}: the tensors do not fit the model that config.json describes; check that "
            "both are of the same checkpoint\n" + "\n".join(lines)
        )
    return [one for (one,) in matches.values()], ignored


def sources(parameters: Iterable[str], rules: Sequence[Rule]) -> list[Match]:
    """The tensors that fill the given parameters, by the rules alone; in the parameters' order."""
    rules = expand(rules)
    return [
        Match(_fill(rule.source, numbers), target, rule.transform)
        for target in parameters
        for rule in rules
        if (numbers := _numbers(rule.target, target)) is not None
    ]


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


def _list(names: list[str]) -> str:
    more = f", … and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
