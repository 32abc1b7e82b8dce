"""The kinds of model there are, a row each: what loading and planning must know of them.

Besides this row a new family is its model in `models/`, its reader in `readers/` and its rules in
`convert/`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import convert
from catp_jax.generation.options import Options
from catp_jax.models.blip2 import Blip2Config
from catp_jax.models.cross_decoder import MaskMode
from catp_jax.models.instructblip import InstructBlipConfig
from catp_jax.models.mllama import MllamaConfig
from catp_jax.models.tiled_vit import VisionMode
from catp_jax.readers import hub
from catp_jax.readers.blip2 import Blip2Reader, InstructBlipReader
from catp_jax.readers.generation_config import generation_defaults
from catp_jax.readers.mllama import MllamaReader
from catp_jax.readers.reading import Reader


@dataclasses.dataclass(frozen=True)
class Family:
    """Models whose configurations are of type `config`.

    `modes` are the options of `load` that its reader takes and no other, with their values.
    `presets` are the configurations of published checkpoints, by their names.
    """

    name: str
    config: type
    reader: type[Reader]
    modes: Mapping[str, tuple[str, ...]]
    presets: Mapping[str, Callable[[], Any]]

    def load_reader(self, folder: Path, config: Any, modes: Mapping[str, str | None]) -> Reader:
        """What reads images and prompts, with the processor in `folder`. Raises ValueError for
        modes that are another family's or none, and if the processor does not fit the model.
        """
        given = {mode: value for mode, value in modes.items() if value is not None}
        if other := [mode for mode in given if mode not in self.modes]:
            owner = next(row for row in FAMILIES if other[0] in row.modes)
            raise ValueError(
                f"{' and '.join(other)}: for {owner.name} only, and {folder} is of {self.name}"
            )
        for mode, value in given.items():
            if value not in self.modes[mode]:
                raise ValueError(f"{mode} is {' or '.join(self.modes[mode])}, got {value!r}")
        return self.reader.load(folder, config, **given)

    def defaults(self, folder: Path, generation_config: bool = True) -> tuple[Options, str]:
        """Options for what is not given, and a line about them for the user, see
        `readers.generation_config.generation_defaults`; without `generation_config` the plain ones.
        """
        if not generation_config:
            return Options(), ""
        return generation_defaults(folder, self.reader.has_generation_config)


FAMILIES = (
    Family(
        "Llama 3.2 Vision",
        MllamaConfig,
        MllamaReader,
        modes={"mask_mode": get_args(MaskMode), "vision_mode": get_args(VisionMode)},
        presets={
            "Llama-3.2-11B-Vision": MllamaConfig.llama_3_2_11b,
            "Llama-3.2-11B-Vision-Instruct": MllamaConfig.llama_3_2_11b,
            "Llama-3.2-90B-Vision": MllamaConfig.llama_3_2_90b,
            "Llama-3.2-90B-Vision-Instruct": MllamaConfig.llama_3_2_90b,
        },
    ),
    Family(
        "BLIP-2",
        Blip2Config,
        Blip2Reader,
        modes={},
        presets={
            "blip2-opt-2.7b": Blip2Config.opt_2_7b,
            "blip2-opt-6.7b": Blip2Config.opt_6_7b,
            "blip2-flan-t5-xl": Blip2Config.flan_t5_xl,
            "blip2-flan-t5-xxl": Blip2Config.flan_t5_xxl,
        },
    ),
    Family(
        "InstructBLIP",
        InstructBlipConfig,
        InstructBlipReader,
        modes={},
        presets={
            "instructblip-vicuna-7b": InstructBlipConfig.vicuna_7b,
            "instructblip-vicuna-13b": InstructBlipConfig.vicuna_13b,
            "instructblip-flan-t5-xl": InstructBlipConfig.flan_t5_xl,
            "instructblip-flan-t5-xxl": InstructBlipConfig.flan_t5_xxl,
        },
    ),
)

PRESETS: Mapping[str, Callable[[], Any]] = {
    key: preset
    for family in FAMILIES
    for name, preset in family.presets.items()
    for key in (name, hub.FULL_NAMES[name])
}
"""Configurations by the names of the published checkpoints, with and without `org/`."""


def family_of(config: Any, name: str | Path) -> Family:
    """The family of a configuration, read from the model `name`. Raises ValueError for a model that
    writes no text.
    """
    for family in FAMILIES:
        if isinstance(config, family.config):
            return family
    raise ValueError(
        f"{name} matches images and texts and writes none; load it with load_matcher, or use "
        "catp-jax match"
    )


def find_config(model: str | Path, ignore_config: Sequence[str] = ()) -> Any:
    """The configuration of a model, by its folder or its name: config.json without the keys
    `ignore_config`, or the preset of a published checkpoint that is not downloaded. Raises
    ValueError for others.
    """
    folder = find_folder(model)
    return PRESETS[str(model)]() if folder is None else convert.read_config(folder, ignore_config)


def find_folder(model: str | Path) -> Path | None:
    """The folder of a model, see `readers.hub.find_folder`; None for one of the `PRESETS` that is
    not downloaded.
    """
    try:
        return hub.find_folder(model)
    except ValueError as error:
        if str(model) in PRESETS:
            return None
        names = ", ".join(name for name in PRESETS if "/" not in name)
        raise ValueError(f"{error}. Published checkpoints are known as {names}") from None
