"""What our adapters see of lmms-eval and VLMEvalKit: the packages themselves where they are
installed, and stand-ins of the same shape where they are not.
"""

import dataclasses
import importlib
import importlib.util
import sys
import types
import warnings
from abc import ABC, abstractmethod
from typing import Any

HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
HAS_VLMEVAL = importlib.util.find_spec("vlmeval") is not None


class CacheHook:
    def add_partial(self, attr: str, req: Any, res: Any) -> None: ...


class Lmms(ABC):
    """lmms_eval.api.model.lmms"""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook, self.task_dict = CacheHook(), {}

    @abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...
    @abstractmethod
    def generate_until(self, requests: Any) -> Any: ...
    @abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...
    @property
    def rank(self) -> int:
        return self._rank


@dataclasses.dataclass
class Instance:
    """lmms_eval.api.instance.Instance"""

    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclasses.dataclass
class GenerationResult:
    """lmms_eval.api.instance.GenerationResult"""

    text: Any
    token_counts: Any = None


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    """lmms_eval.models.registry_v2.ModelManifest"""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class BaseModel:
    """vlmeval.vlm.base.BaseModel"""

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: Any, dataset: str | None = None) -> str:
        assert {part["type"] for part in message} <= {*self.allowed_types}
        return self.generate_inner(message, dataset)


LMMS_EVAL = {
    "lmms_eval.api.model": {"lmms": Lmms},
    "lmms_eval.api.instance": {"Instance": Instance, "GenerationResult": GenerationResult},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
}
VLMEVAL = {"vlmeval.vlm.base": {"BaseModel": BaseModel}}


def module(name: str) -> Any:
    """A module of ours or theirs; a harness that is missing has its stand-ins in its place."""
    stand_ins = {} if HAS_LMMS_EVAL else LMMS_EVAL
    stand_ins |= {} if HAS_VLMEVAL else VLMEVAL
    for full, content in stand_ins.items():
        parts = full.split(".")
        for count in range(1, len(parts) + 1):
            one = ".".join(parts[:count])
            sys.modules.setdefault(one, types.ModuleType(one))
        vars(sys.modules[full]).update(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, as they are imported
        return importlib.import_module(name)
