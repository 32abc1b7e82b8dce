"""Adapters: our models in other people's evaluation harnesses, `lmms_eval` and `vlmevalkit`.

The harnesses are not installed with this package, and nothing else here imports their adapters.
"""

from typing import Any


def lmms_eval_manifest() -> Any:
    """What lmms-eval finds by its entry points: the model `catp_jax` and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore

    return ModelManifest(
        model_id="catp_jax", simple_class_path="catp_jax.evaluation.lmms_eval.CatpJax"
    )
