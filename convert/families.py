"""The kinds of model there are, and what is done alike for all of them."""

from collections.abc import Sequence
from typing import Any

from catp_jax.models.blip2 import Blip2, Blip2Config
from catp_jax.models.instructblip import InstructBlip, InstructBlipConfig
from catp_jax.models.mllama import Mllama, MllamaConfig
from catp_jax.models.retrieval import Blip2Retrieval, RetrievalConfig
from convert.blip2 import BLIP2, INSTRUCTBLIP
from convert.configs import without
from convert.family import Family
from convert.mllama import MLLAMA
from convert.parts import parse

Config = MllamaConfig | Blip2Config | RetrievalConfig | InstructBlipConfig
Model = Mllama | Blip2 | Blip2Retrieval | InstructBlip

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (MLLAMA, BLIP2, INSTRUCTBLIP)
}
"""By the `model_type` of config.json."""


def family_of(config: Config) -> Family:
    """The kind of model that a configuration describes."""
    return next(family for family in FAMILIES.values() if type(config) in family.models)


def parse_config(
    raw: dict[str, Any], where: str = "config.json", ignore: Sequence[str] = ()
) -> Config:
    """The configuration in the content of a config.json, which `where` names in errors."""
    raw = without(raw, ignore, where)
    kind = raw.get("model_type")
    supported = ", ".join(FAMILIES)
    tables = [table for family in FAMILIES.values() for table in family.tables]
    if any(kind == part.model_type for table in tables for part in table.inside()):
        raise ValueError(
            f"{where} is of {kind}, a language model or a part, and no whole model of images and "
            f"text; supported: {supported}"
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where}: model_type is {kind!r}; supported: {supported}")
    return parse(raw, where, FAMILIES[kind].tables)


def config_json(config: Config, **extra: Any) -> dict[str, Any]:
    """The config.json of a model of ours; `extra` adds to its text part (`eos_token_id` …), or
    where there is no language model to the Q-Former's.

    Tokens that are not given are None, where transformers would put those of some language model.
    """
    tables = family_of(config).tables
    content = next(one for one in tables if one.kind is type(config)).write(config)
    content["text_config" if "text_config" in content else "qformer_config"] |= extra
    return content
