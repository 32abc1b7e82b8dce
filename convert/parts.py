"""A part of a config.json as a table: which keys it has, how they are checked, read and written.

    VISION = Part(VitConfig, "blip_2_vision_model", {"hidden_size": SIZE, "hidden_act": ACTIVATION})

Reading and writing go by the same table. Values are those of transformers' config classes, which
fill in what a file leaves out.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from catp_jax.models.layers import ACTIVATIONS
from convert.configs import check_keys, check_repeated, fill_defaults, short

MOST_LAYERS, LARGEST, WIDEST = 1000, 2**24, 2**14  # of layers, of anything else; pixels of a side


@dataclasses.dataclass(frozen=True)
class Field:
    """A key that is read into one of our configurations, under the same name or as `name`.

    `check` says what is wrong with the key of a part. `default` is for keys that transformers does
    not know.
    """

    check: Callable[[Any, str], list[str]] = lambda part, key: []
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value
    name: str | None = None
    default: Any = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a config.json, or all of it, and the configuration `kind` that it becomes.

    `architectures` are the classes of transformers whose files it reads; none: any.
    `parts` are the parts within it: of several candidates, `model_type` says which. `fixed` are
    keys that have one value here (of what others are, `hint` says), those in `must_be_false` have
    none in the file, and those in `unread` change nothing. `together` says what is wrong with
    values that are good by themselves; `settle` gives fields that are not just what transformers
    says; `written` keys that follow from a configuration.
    """

    kind: type
    model_type: str
    fields: Mapping[str, Field]
    architectures: Sequence[str] = ()
    parts: Mapping[str, Sequence["Part"]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hint: str = ""
    must_be_false: str = ""
    unread: str = ""
    together: Callable[[Any], list[str]] = lambda part: []
    settle: Callable[[Any], dict[str, Any]] = lambda part: {}
    written: Callable[[Any], dict[str, Any]] = lambda config: {}

    def check_keys(self, raw: Any, prefix: str = "") -> list[str]:
        """What is wrong with the keys of a file's part, whose place is `prefix`. Raises ValueError
        if a part within it is none of the candidates.
        """
        raw = raw if isinstance(raw, dict) else {}
        known = {*self.fields, *self.parts, *self.fixed, *self.unread.split()}
        problems = check_keys(raw, prefix, known, self.must_be_false.split())
        for key, candidates in self.parts.items():
            inside = raw.get(key)
            kind = inside.get("model_type") if isinstance(inside, dict) else None
            part = _choose(key, candidates, kind or candidates[0].model_type)
            problems += part.check_keys(inside, f"{prefix}{key}.")
        return problems

    def check(self, part: Any) -> list[str]:
        """What is wrong with the values."""
        problems = [line for key, field in self.fields.items() for line in field.check(part, key)]
        for key, wanted in self.fixed.items():
            if (value := getattr(part, key, wanted)) != wanted:
                problems.append(f"{key} is {value!r}; supported: {wanted!r}{self.hint}")
        for key, inside, table in self._inside(part):
            problems += [f"{key}: {line}" for line in table.check(inside)]
        return problems or self.together(part)

    def read(self, part: Any) -> Any:
        """The configuration of a checked part."""
        values = {
            field.name or key: field.read(getattr(part, key, field.default))
            for key, field in self.fields.items()
        }
        values |= {_name(key): table.read(inside) for key, inside, table in self._inside(part)}
        return self.kind(**values | self.settle(part))

    def write(self, config: Any) -> dict[str, Any]:
        """The part of a config.json that `read` makes into `config`."""
        content: dict[str, Any] = {"model_type": self.model_type, **self.fixed}
        if self.architectures:
            content["architectures"] = [self.architectures[0]]
        content |= dict.fromkeys(self.must_be_false.split(), False)
        for key, field in self.fields.items():
            content[key] = field.write(getattr(config, field.name or key))
        for key, candidates in self.parts.items():
            inside = getattr(config, _name(key))
            content[key] = next(p for p in candidates if p.kind is type(inside)).write(inside)
        return content | self.written(config)

    def inside(self) -> list["Part"]:
        """All candidates for the parts within it."""
        return [part for candidates in self.parts.values() for part in candidates]

    def _inside(self, part: Any) -> Iterator[tuple[str, Any, "Part"]]:
        """The parts of a part, with their tables."""
        for key, candidates in self.parts.items():
            inside = getattr(part, key)
            yield key, inside, _choose(key, candidates, inside.model_type)


def _choose(key: str, candidates: Sequence[Part], kind: str) -> Part:
    if len(candidates) == 1:
        return candidates[0]
    by_type = {part.model_type: part for part in candidates}
    if kind not in by_type:
        raise ValueError(
            f"the language model is {kind!r} ({key}.model_type); supported: {', '.join(by_type)}"
        )
    return by_type[kind]


def parse(raw: dict[str, Any], where: str, tables: Sequence[Part]) -> Any:
    """The configuration in a config.json, which `where` names in errors, by the table of its
    architecture: by the first if it names none.

    Raises ValueError with all that is not supported.
    """
    names = raw.get("architectures") or tables[0].architectures
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: architectures is {short(names)}; a list of names is wanted")
    fit = [one for one in tables if not one.architectures or {*names} & {*one.architectures}]
    if not fit:
        wanted = " or ".join(one.architectures[0] for one in tables)
        raise ValueError(f"{where} is of {' and '.join(names)}; a whole model is wanted ({wanted})")
    table = fit[0]
    try:
        problems = table.check_keys(raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    try:
        part = fill_defaults(raw)
    except ModuleNotFoundError:
        raise  # transformers itself is missing
    except Exception as error:  # its validators raise what they like
        problems.append(f"transformers refuses it: {' '.join(str(error).split())}")
    else:
        problems += [*check_repeated(raw, part), *table.check(part)]
        if not problems:
            return table.read(part)
    raise ValueError(
        f"{where} asks for what is not supported here, or does not fit together\n  "
        + "\n  ".join(problems)
    )


def _name(key: str) -> str:
    """What a configuration of ours calls a part: `vision` for `vision_config`."""
    return key.removesuffix("_config")


def check_size(part: Any, key: str) -> list[str]:
    """A line if a value is no positive number, or a size that no model has."""
    value, most = getattr(part, key), MOST_LAYERS if key.endswith("layers") else LARGEST
    if not is_positive(value):
        return [f"{key} is {value!r}; a positive number is wanted"]
    return [f"{key} is {value!r}; at most {most} is read"] if value > most else []


def _check_activation(part: Any, key: str) -> list[str]:
    if (name := getattr(part, key)) in ACTIVATIONS:
        return []
    return [f"{key} is {name!r}; supported: {', '.join(sorted(ACTIVATIONS))}"]


def _check_square(part: Any, key: str) -> list[str]:
    if side(value := getattr(part, key)) is not None:
        return []
    return [f"{key} is {value}; images, tiles and patches are square, of at most {WIDEST} pixels"]


def is_positive(value: Any) -> bool:
    """Whether it is a number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def side(size: Any) -> Any:
    """The side of a square given as a number or as two; None if it is none, or none of images."""
    sides = size if isinstance(size, list | tuple) else [size]
    is_square = all(is_positive(one) and one == sides[0] and one <= WIDEST for one in sides)
    return sides[0] if sides and is_square else None


ANY = Field()
SIZE = Field(check_size)
ACTIVATION = Field(_check_activation)
SQUARE = Field(_check_square, read=side)


def sizes(keys: str) -> dict[str, Field]:
    """Fields that are all positive numbers."""
    return dict.fromkeys(keys.split(), SIZE)


def check_heads(part: Any, heads: str = "num_attention_heads") -> list[str]:
    """A line if the heads do not divide the width."""
    width, number = part.hidden_size, getattr(part, heads)
    return [f"hidden_size {width} does not split into {number} heads"] if width % number else []


def check_patches(part: Any) -> list[str]:
    """A line if the patches do not divide an image's side."""
    image, patch = side(part.image_size), side(part.patch_size)
    return [f"image_size {image} is not a multiple of patch_size {patch}"] if image % patch else []
