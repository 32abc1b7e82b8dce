"""Which tensor of a checkpoint fills each parameter of a model; this file matches and checks them.

    Rule("vit.layers.*.qkv.kernel", "vit.layers.*.qkv.weight", THREE)

Modules have the paths that they have in the checkpoint, so that the last word of a parameter's name
says nearly all (`GENERAL`); what differs stands before that, in a table of its family. `*` is a
number and `**` anything, the same in both names. Every parameter must find the one tensor that it
wants, of the shape it wants, and every tensor must be wanted, or a `Twin`, or an `Ignore`. Whatever
does not fit is collected, and one error lists it all.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from catp_jax.messages import listed

Shape = tuple[int, ...]

ROWS = 512  # rows of a matrix that are transposed as one


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


def _assign(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, which for bfloat16 alone would hold Python's lock."""
    if out.dtype == values.dtype:
        raw = f"u{out.itemsize}"
        out, values = out.view(raw), values.view(raw)
    out[...] = values


def copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What a transform shows, as an array of its own, contiguous and of type `dtype`.

    A transposed matrix goes by some rows at a time, a cache line between them: where their distance
    is a power of two, the numbers of a column push each other out of the processor's cache. A
    matrix of 4096 × 14336 in bfloat16 takes 0.06 s, without that line 0.18.
    """
    out = np.empty(view.shape, dtype)
    if view.ndim < 2 or view.strides[-1] == view.itemsize:
        _assign(out, view)
        return out
    *rest, columns = view.shape
    width = math.prod(rest)
    room = np.empty((min(ROWS, columns), width + 64 // view.itemsize), view.dtype)[:, :width]
    for start in range(0, columns, ROWS):
        rows = np.moveaxis(view[..., start : start + ROWS], -1, 0)
        apart = room[: len(rows)].reshape(rows.shape)
        _assign(apart, rows)
        _assign(out[..., start : start + ROWS], np.moveaxis(apart, 0, -1))
    return out


@dataclasses.dataclass(frozen=True)
class Rule:
    """Parameters whose name fits `target` are filled from the tensor that `source` names."""

    target: str
    source: str
    transform: Transform = IDENTITY


GENERAL = (
    Rule("**.kernel", "**.weight", TRANSPOSE),
    Rule("**.scale", "**.weight"),
    Rule("**.embedding", "**.weight"),
    Rule("**", "**"),
)
"""What holds for every family where none of its own rules does."""


@dataclasses.dataclass(frozen=True)
class Match:
    """One tensor (`source`) and the parameter (`target`) it fills."""

    source: str
    target: str
    transform: Transform


@dataclasses.dataclass(frozen=True)
class Matching:
    """Where the tensors of a checkpoint go: one to each parameter, `twins` once more to some.

    `filled` are the former, by parameter and in the order of the tensors. `ignored` are the names
    of those left out, with the reason.
    """

    filled: dict[str, Match]
    twins: list[Match]
    ignored: dict[str, str]


def tensor_of(parameter: str, rules: Iterable[Rule]) -> Match:
    """The tensor that a parameter is filled from, by the first rule that fits."""
    for rule in (*rules, *GENERAL):
        if (words := _words(rule.target, parameter)) is not None:
            return Match(_fill(rule.source, words), parameter, rule.transform)
    raise RuntimeError(f"no rule fits {parameter!r}")


@dataclasses.dataclass(frozen=True)
class Names:
    """What a checkpoint's tensors are called. `wanted` are those that a model's parameters are
    filled from.

    `twins` are second names, with the tensors that they may stand for: models share these, and
    checkpoints hold them under one name or both. If a parameter wants a name for itself, it is no
    twin there. `ignores` are patterns of names that are left out, with the reason; `hints` say, for
    the name of a tensor, what it may mean that it is missing.
    """

    wanted: Mapping[str, Match]
    twins: Mapping[str, Sequence[str]]
    ignores: Mapping[str, str]
    hints: Mapping[str, str]

    def places(self, names: Iterable[str]) -> dict[str, Match]:
        """Where tensors of these names go; those that go nowhere are left out."""
        found: dict[str, Match] = {}
        for name in names:
            firsts = [name, *self.twins.get(name, ())]
            if first := next((first for first in firsts if first in self.wanted), None):
                found[name] = dataclasses.replace(self.wanted[first], source=name)
        return found

    def match(
        self, tensors: Mapping[str, Shape], parameters: Mapping[str, Shape], where: str
    ) -> Matching:
        """Pairs every tensor with its parameter. Raises ValueError, in which `where` names the
        checkpoint, with all that does not fit.
        """
        places = self.places(tensors)
        filled: dict[str, Match] = {}
        again: list[Match] = []
        for name in sorted(places, key=lambda name: name not in self.wanted):  # a twin if need be
            one = places[name]
            if filled.setdefault(one.target, one) is not one:
                again.append(one)
        ignored = {
            name: reason
            for name in tensors
            for pattern, reason in self.ignores.items()
            if name not in places and _words(pattern, name) is not None
        }
        missing = [name for name, one in self.wanted.items() if one.target not in filled]
        shapes = {
            name: one.transform.source_shape(parameters[one.target]) for name, one in places.items()
        }
        problems = {
            "missing": missing,
            "unknown (no such place with this config.json)": [
                name for name in tensors if name not in places and name not in ignored
            ],
            "of another shape than config.json says": [
                f"{name} (has {tensors[name]}, wanted {shape})"
                for name, shape in shapes.items()
                if tensors[name] != shape
            ],
        }
        if any(problems.values()):
            lines = [
                f"  {len(names)} {kind}: {listed(names)}"
                for kind, names in problems.items()
                if names
            ]
            lines += [f"  {hint}" for name, hint in self.hints.items() if name in missing]
            raise ValueError(
                f"{where}: the tensors do not fit the model that config.json describes; check that "
                "both are of the same checkpoint\n" + "\n".join(lines)
            )
        return Matching(filled, again, ignored)


def _words(pattern: str, name: str) -> tuple[str, ...] | None:
    """What stands for each `*` and `**` of a pattern; None if the name does not fit."""
    fit = _compile(pattern).fullmatch(name)
    return None if fit is None else fit.groups()


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\*\*", "(.+)")
    return re.compile(escaped.replace(r"\*", r"(\d+)"))


def _fill(pattern: str, words: tuple[str, ...]) -> str:
    rest = iter(words)
    return re.sub(r"\*+", lambda _: next(rest), pattern)
