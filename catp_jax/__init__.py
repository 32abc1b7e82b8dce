"""BLIP-2, InstructBLIP and Llama 3.2 Vision in JAX/Flax, visual tokens pruned under jax.jit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catp_jax.answers import Answers as Answers
    from catp_jax.api import load as load
    from catp_jax.matching import Matcher as Matcher
    from catp_jax.matching import load_matcher as load_matcher
    from catp_jax.model import Model as Model

ROOMS = {
    "Answers": "answers",
    "Matcher": "matching",
    "Model": "model",
    "load": "api",
    "load_matcher": "matching",
}
__all__ = ["Answers", "Matcher", "Model", "load", "load_matcher"]


def __getattr__(name: str) -> Any:
    # on first use: `convert`, which api imports, itself imports the models from this package
    if name in ROOMS:
        return getattr(import_module(f"catp_jax.{ROOMS[name]}"), name)
    raise AttributeError(f"module 'catp_jax' has no attribute {name!r}")
