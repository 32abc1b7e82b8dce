"""A LoRA adapter beside a checkpoint, or elsewhere: merged into the weights as they stream.

    W + scale · B A        scale = alpha / r, or alpha / √r (rank-stabilised)

in float32, then cast to what is wanted. What peft's `modules_to_save` hold takes the place of the
base's. Every other kind of adapter is refused by name.

Source: LoRA: Low-Rank Adaptation of Large Language Models, 2106.09685; the files are peft's.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from catp_jax import strict_json
from catp_jax.files import is_there
from catp_jax.messages import listed
from convert.shards import Tensor, read_shard

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("fan_in_fan_out", "modules_to_save", "bias", "init_lora_weights"),
}
OF_TRAINING = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("peft_version", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_config", "megatron_core", "eva_config", "runtime_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` under which the adapter goes with the base as it was published."""
NAMES = {"use_dora": "DoRA", "use_qalora": "QALoRA", "trainable_token_indices": "trained tokens"}

LAYER = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
OTHERS = {
    ".lora_embedding_": "LoRA on an embedding",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B": "LoRA with a bias",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged(Tensor):
    """A linear layer's weight with an adapter's product added: `down` is A, `up` is B."""

    down: Tensor
    up: Tensor
    scale: float
    is_turned: bool

    def values(self) -> np.ndarray:
        """The merged weight, in float32."""
        base, down, up = (
            np.asarray(values, np.float32)
            for values in (super().values(), self.down.values(), self.up.values())
        )
        change = up @ (down * np.float32(self.scale))
        return base + (change.T if self.is_turned else change)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter, its header read: pairs of A and B by the module, and whole tensors by name."""

    folder: Path
    settings: Mapping[str, Any]
    pairs: Mapping[str, Mapping[str, Tensor]]
    whole: Mapping[str, Tensor]

    def apply(self, tensors: Mapping[str, Tensor], find: Callable[[str], str]) -> dict[str, Tensor]:
        """The tensors that the adapter changes, changed; `find` gives a tensor's name among
        `tensors` by that in the adapter, or raises ValueError.
        """
        changed: dict[str, Tensor] = {}
        problems = []
        # whole tensors first: products may be added to them
        pairs = {f"{module}.weight": pair for module, pair in self.pairs.items()}
        for name, change in (*self.whole.items(), *pairs.items()):
            try:
                own = find(name)
                base = changed.get(own, tensors[own])
                if isinstance(change, Tensor):
                    changed[own] = _replace(name, base, change)
                else:
                    changed[own] = self._merge(name.removesuffix(".weight"), base, change)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError(
                f"the adapter {self.folder} does not fit the model; check that it was trained on "
                f"this one: {listed(problems)}"
            )
        return changed

    def _merge(self, module: str, base: Tensor, pair: Mapping[str, Tensor]) -> Merged:
        settings = self.settings
        if isinstance(base, Merged):
            raise ValueError(f"{module} is adapted twice, under two names")
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{module} has one of lora_A and lora_B, not both")
        rank = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
        alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        down, up = pair["A"], pair["B"]
        is_turned = bool(settings.get("fan_in_fan_out"))
        wanted = base.shape[::-1] if is_turned else base.shape
        if up.shape + down.shape != (*wanted[:1], rank, rank, *wanted[1:]) or len(wanted) != 2:
            raise ValueError(
                f"{module} is {base.shape}, lora_A {down.shape} and lora_B {up.shape}; linear "
                f"layers of rank {rank} are merged"
            )
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        fields: dict[str, Any] = {**vars(base), "origin": "adapter merged"}
        return Merged(**fields, down=down, up=up, scale=scale, is_turned=is_turned)


def _replace(name: str, base: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of the adapter in the place of the base's."""
    if base.shape != tensor.shape:
        raise ValueError(f"{name} has shape {tensor.shape}, the base's {base.shape}")
    return dataclasses.replace(tensor, name=base.name, origin="the adapter's")


def find_adapter(folder: Path, adapter: Path | None) -> Adapter | None:
    """The adapter to merge into a checkpoint: `adapter`, or the one beside it, or none.

    Raises ValueError if there are two, or if it is damaged or of a kind that is not merged.
    """
    beside = any(os.path.lexists(folder / name) for name in (CONFIG, WEIGHTS))
    if adapter is None:
        return read_adapter(folder) if beside else None
    if beside:
        raise ValueError(
            f"{folder} has an adapter of its own ({WEIGHTS}) besides {adapter}; move one away"
        )
    return read_adapter(adapter)


def read_adapter(folder: Path) -> Adapter:
    """An adapter, checked by itself. Raises ValueError."""
    if not is_there(folder / CONFIG):
        also = f", though it has {WEIGHTS}" if os.path.lexists(folder / WEIGHTS) else ""
        raise ValueError(f"{folder} is no adapter: it has no {CONFIG}{also}")
    settings = strict_json.read(folder / CONFIG)
    if problems := _check(settings):
        raise ValueError(
            f"{folder / CONFIG} is of an adapter that is not merged here; merge it with peft's "
            "merge_and_unload() and save the whole model\n  " + "\n  ".join(problems)
        )
    if not is_there(folder / WEIGHTS):
        if is_there(folder / "adapter_model.bin"):
            raise ValueError(
                f"{folder} has its adapter as a PyTorch pickle (adapter_model.bin), which is not "
                "read; load it with peft and save it again, which writes safetensors"
            )
        raise ValueError(
            f"{folder} has {CONFIG} but no {WEIGHTS}; copy it too, or move {CONFIG} away"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for tensor in read_shard(folder / WEIGHTS).tensors:
        name = tensor.name.removeprefix("base_model.model.")
        if fit := LAYER.fullmatch(name):
            pairs.setdefault(fit[1], {})[fit[2]] = tensor
        elif kind := next((kind for mark, kind in OTHERS.items() if mark in name), None):
            raise ValueError(f"{folder} is no LoRA of linear layers alone: {name} is of {kind}")
        else:
            whole[name.replace(".base_layer.", ".")] = tensor
    for module in settings.get("modules_to_save") or ():
        if not any(f".{module}." in f".{name}" for name in whole):
            raise ValueError(f"{folder / WEIGHTS} has no {module}, which modules_to_save names")
    return Adapter(folder, settings, pairs, whole)


def _check(settings: dict[str, Any]) -> list[str]:
    """What is wrong with an adapter_config.json."""
    if (kind := settings.get("peft_type")) != "LORA":
        return [f"peft_type is {kind!r}; LORA is merged"]
    problems = [
        f"{key} is {value!r}{f': {NAMES[key]}' if key in NAMES else ''}"
        for key, value in settings.items()
        if value and key not in READ | OF_TRAINING
    ]
    for key in ("r", "lora_alpha"):
        problems += _not_a_number(key, settings.get(key))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, dict):
            problems.append(f"{key} is not an object")
            continue
        for pattern, value in patterns.items():
            problems += _not_a_number(f"{key}.{pattern}", value)
            if not _is_pattern(pattern):
                problems.append(f"{key} has {pattern!r}, which is no name of modules")
    modules = settings.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(one, str) for one in modules):
        problems.append(f"modules_to_save is {modules!r}; a list of names is wanted")
    if (bias := settings.get("bias", "none")) != "none":
        problems.append(f"bias is {bias!r}; only without trained biases ('none')")
    if (start := settings.get("init_lora_weights")) not in KEEP_THE_BASE:
        problems.append(f"init_lora_weights is {start!r}, which changes the base's weights, too")
    return problems


def _is_pattern(text: str) -> bool:
    """Whether a name of modules may be matched: a regular expression that cannot take forever."""
    if not re.fullmatch(r"\^?[\w.*\\+\-\[\]|]{1,200}\$?", text):
        return False
    if len(re.findall(r"[*+]", text)) > 2:
        return False
    try:
        re.compile(rf"(.*\.)?({text})$")
    except re.error:
        return False
    return True


def _not_a_number(key: str, value: Any) -> list[str]:
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return []
    return [f"{key} is {value!r}; a positive number is wanted"]


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's name, as in peft."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def alone(folder: Path) -> str | None:
    """What to do with a folder that holds an adapter and no model; None if it holds none."""
    if not is_there(folder / CONFIG):
        return None
    base = strict_json.read(folder / CONFIG).get("base_model_name_or_path")
    return (
        f"{folder} is an adapter for {base}, not a model; load the model with "
        "adapter='FOLDER' (--adapter FOLDER), which merges the two"
    )
