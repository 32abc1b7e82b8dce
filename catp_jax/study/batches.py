"""The batches of a study's questions, and the model that answers them under a setting."""

import dataclasses
import enum
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from catp_jax.contract import Site
from catp_jax.pruning import named
from catp_jax.readers.images import quoted
from catp_jax.struct import replace
from catp_jax.study.cost import in_parallel
from catp_jax.study.half_pixels import HALVED, halved
from catp_jax.study.records import Conditions, Setting
from catp_jax.study.tasks import Example

Pruners = tuple[Any, ...]


@runtime_checkable
class Answerer(Protocol):
    """What a study needs of a loaded model (`catp_jax.model`).

    `describe` is a fingerprint, as JSON has it. `prepare` gives `inputs`, `available`, the visual
    tokens of each prompt, and `most`, what a prompt of the model may have; `encode` does once what
    all settings have in common, and `late` has the prompts' last tokens read from the cache.
    `generate_packed` takes the fields of `generation.options.Options` and gives `text`, `logits` of
    the first new token, and `kept`, None or one entry a prompt, whose `number` counts visual tokens
    before pruning, whether it `is_merged`, and what is `cached` by layer.
    `seeing` is the model to which smaller images are shown. Of its `reader` a study asks for the
    image as the model sees it and where in it visual tokens lie: `picture`, `framed`, `grid`,
    `needed` and `kept_map` of `readers.reading.Reader`.
    """

    @property
    def dtype(self) -> Any: ...
    @property
    def sites(self) -> frozenset[Site]: ...
    @property
    def network(self) -> Any: ...
    @property
    def reader(self) -> Any: ...
    def describe(self) -> dict[str, Any]: ...
    def seeing(self, image_scale: float = ..., tiles: int | None = ...) -> Any: ...
    def prepare(self, images: Any, prompts: Any, begun: Any) -> Any: ...
    def late(self, packed: Any) -> Any: ...
    def encode(self, packed: Any) -> Any: ...
    def generate_packed(self, packed: Any, pruners: Any, **options: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """A batch whose images are encoded: its number, what it was made of, the model's inputs, and
    the milliseconds that encoding took.

    `needed` is how much of each prompt's visual tokens the answer depends on, where the task says.
    """

    number: int
    examples: Sequence[Example]
    packed: Any
    ms: float
    needed: Float[np.ndarray, "b n"] | None


class Batches:
    """The questions, cut into batches, and the model that answers them.

    It remembers for which shapes programs have been compiled, so that no compiling is timed.
    """

    def __init__(
        self,
        model: Answerer,
        examples: Sequence[Example],
        conditions: Conditions,
        is_timed: bool,
        report: Callable[[str], None],
    ) -> None:
        self.model, self.conditions = model, conditions
        self.is_timed, self.report = is_timed, report
        starts = range(0, len(examples), conditions.batch)
        self._examples = [examples[start : start + conditions.batch] for start in starts]
        self._compiled: set[str] = set()
        self._encoded: set[str] = set()

    def __len__(self) -> int:
        return len(self._examples)

    def examples(self, number: int) -> Sequence[Example]:
        """The questions of a batch."""
        return self._examples[number]

    def encode_each(self, number: int, settings: Sequence[Setting]) -> dict[Setting, EncodedBatch]:
        """A batch as each of the settings has it: once for all that see its images alike."""
        seen = {setting: (setting.method == HALVED, str(setting.seen)) for setting in settings}
        first = {look: setting for setting, look in reversed(seen.items())}
        encoded = {look: self.encode(number, setting) for look, setting in first.items()}
        return {setting: encoded[look] for setting, look in seen.items()}

    def encode(self, number: int, setting: Setting) -> EncodedBatch:
        """A batch, read and encoded, its images as the setting shows them.

        Raises ValueError, with the id and the image, for a question that cannot be used.
        """
        examples = self._examples[number]
        if setting.method == HALVED:
            examples = halved(examples)
        model = self.model.seeing(**setting.seen) if setting.seen else self.model
        packed = self._prepare(number, examples, model)
        packed = model.late(packed) if self.conditions.is_late else packed
        shapes = str(jax.tree.map(jnp.shape, packed.inputs))
        if self.is_timed and shapes not in self._encoded:
            jax.block_until_ready(model.encode(packed).encoded)  # compiles
            self._encoded.add(shapes)
        packed, ms = self._clocked(lambda: model.encode(packed))
        # of smaller images the share kept would say nothing
        needed = None if setting.seen else self._needed(examples, packed)
        return EncodedBatch(number, examples, packed, ms, needed)

    def _needed(self, examples: Sequence[Example], packed: Any) -> np.ndarray | None:
        if not any(example.needed for example in examples):
            return None
        out = np.zeros((len(packed.available), max(packed.available)), np.float32)
        images, boxes = zip(*((one.image, one.needed) for one in examples), strict=True)
        model = self.model
        for row, found in enumerate(model.reader.needed(model.network, packed, images, boxes)):
            out[row, : len(found)] = found
        return out  # nothing for what fills the batch up

    def _prepare(self, number: int, examples: Sequence[Example], model: Any) -> Any:
        """The model's inputs of a batch, filled up to the common size; a lone one keeps its own."""
        examples = list(examples)
        filled = (examples * self.conditions.batch)[: self.conditions.batch] if number else examples
        prompts = [self.conditions.ask(example.question) for example in filled]
        begun = [self.conditions.begun] * len(filled)
        try:
            return model.prepare([example.image for example in filled], prompts, begun)
        except ValueError:
            for example, prompt in zip(examples, prompts, strict=False):
                try:
                    model.prepare([example.image], [prompt], begun[:1])
                except ValueError as error:
                    raise ValueError(
                        f"question {example.id!r} about {quoted(str(example.image))}: {error}"
                    ) from None
            raise

    def pruners(self, setting: Setting, batch: EncodedBatch) -> Pruners:
        """The setting's methods for a batch; one that draws does so anew for each question.

        A count is the same for every prompt, a percentage leaves each prompt its own.
        """
        pruners = []
        for pruner in self._undrawn(setting, batch):
            if hasattr(pruner, "seed"):
                seeds = [_mixed(pruner.seed, seed) for seed in self._seeds(batch)]
                pruner = replace(pruner, seed=jnp.asarray(seeds, jnp.uint32))
            if hasattr(pruner, "needed"):
                if batch.needed is None:
                    raise ValueError(
                        f"{setting.method} must know which visual tokens are needed, and no "
                        f"question of {self.conditions.task} says so (scenes do)"
                    )
                pruner = replace(pruner, needed=jnp.asarray(batch.needed))
            pruners.append(pruner)
        return tuple(pruners)

    def _undrawn(self, setting: Setting, batch: EncodedBatch) -> Pruners:
        """The same, with each method's own seed."""
        if setting.keep is None or setting.seen:
            return ()
        packed, methods = batch.packed, named.named(setting.method, setting.keep)
        slots = max(packed.available)
        try:
            return named.pruners(methods, packed.available, slots, self.model.sites, packed.most)
        except ValueError as error:
            raise ValueError(f"{setting.method}: {error}") from None

    def _seeds(self, batch: EncodedBatch) -> list[int]:
        """The seed of each prompt of a batch."""
        first = self.conditions.seed + batch.number * self.conditions.batch
        return [first + row for row in range(len(batch.packed.available))]

    def as_data(self, setting: Setting, batch: EncodedBatch) -> tuple[dict[str, Any], ...]:
        """The setting's methods as classes and fields."""
        return tuple(
            {
                "class": type(pruner).__name__,
                **{
                    field.name: _as_json(getattr(pruner, field.name))
                    for field in dataclasses.fields(pruner)
                    if field.name not in ("keep", "limit", "needed")
                },
                "keep": keep,
            }
            for pruner, (_, keep) in zip(
                self._undrawn(setting, batch),
                ()
                if setting.keep is None or setting.seen
                else named.named(setting.method, setting.keep),
                strict=False,  # no prompt may have an image
            )
        )

    def ask(self, pruners: Pruners, batch: EncodedBatch) -> tuple[Any, float]:
        """A batch's answers, and the milliseconds that they took.

        Raises ValueError, with the questions' ids, if they do not fit.
        """
        options = dataclasses.replace(self.conditions.options, seed=self._seeds(batch))
        try:
            return self._clocked(
                lambda: self.model.generate_packed(batch.packed, pruners, **vars(options))
            )
        except ValueError as error:
            first, last = batch.examples[0].id, batch.examples[-1].id
            raise ValueError(f"questions {first!r} to {last!r}: {error}") from None

    def compile(self, pruned: dict[Setting, Pruners], encoded: dict[Setting, EncodedBatch]) -> None:
        """Runs what has not run for this batch's shapes."""
        programs = {  # seeds, and what is needed, do not make another one
            str(jax.tree.map(jnp.shape, (encoded[setting].packed.inputs, pruners))): setting
            for setting, pruners in pruned.items()
        }
        new = {key: setting for key, setting in programs.items() if key not in self._compiled}
        if new:
            self.report(f"compiling {len(new)} programs")
            in_parallel(
                lambda setting: self.ask(pruned[setting], encoded[setting]),
                new.values(),
                self.model.network,
            )
            self._compiled |= {*new}

    def forget_programs(self) -> None:
        """Makes room for those of other settings."""
        jax.clear_caches()
        self._compiled.clear()
        self._encoded.clear()

    def _clocked(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a call gives, and the milliseconds that it took."""
        started = time.perf_counter()
        out = call()
        if self.is_timed:
            jax.block_until_ready(getattr(out, "encoded", None))
        return out, 1000 * (time.perf_counter() - started)


def _mixed(*seeds: int) -> int:
    """One seed of several: seeds 0 and 1 of a method draw nothing alike, whatever the question."""
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def _as_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, dict) or dataclasses.is_dataclass(value):  # learned arrays
        checksum = hashlib.sha256()
        for array in jax.tree.leaves(value):
            checksum.update(np.asarray(array).tobytes())
        return checksum.hexdigest()[:16]
    return np.asarray(value).tolist() if hasattr(value, "shape") else value
