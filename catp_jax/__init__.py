"""BLIP-2 and Llama 3.2 Vision in JAX, with visual-token pruning that keeps shapes fixed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catp_jax.answers import Answers as Answers
    from catp_jax.api import Model as Model
    from catp_jax.api import load as load
    from catp_jax.matching import Matcher as Matcher
    from catp_jax.matching import load_matcher as load_matcher

__all__ = ["Answers", "Matcher", "Model", "load", "load_matcher"]
ROOMS = {"Answers": "answers", "Matcher": "matching", "load_matcher": "matching"}  # else api


def __getattr__(name: str) -> Any:
    # on first use: `convert`, which api imports, itself imports the models from this package
    if name in __all__:
        return getattr(import_module(f"catp_jax.{ROOMS.get(name, 'api')}"), name)
    raise AttributeError(f"module 'catp_jax' has no attribute {name!r}")
