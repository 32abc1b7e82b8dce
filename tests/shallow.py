"""The shipped models with their first layers alone.

    MINI = shallow("mini-blip2-opt")  # a folder

Tokenizers, processors and sizes are those of the shipped models, and so is what a test asks of an
option, a mesh or a file; but a program is compiled in a fraction of the time, since its length is
that of the layers. What they answer may be wrong.
"""

import atexit
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

import catp_jax

ASSETS = Path(catp_jax.__file__).parent / "assets"
BLIP2 = {"vision_config": {"num_hidden_layers": 1}, "qformer_config": {"num_hidden_layers": 2}}
CUT: dict[str, dict[str, dict[str, Any]]] = {
    # three, so that FastV's layer 2 is there
    "mini-blip2-opt": BLIP2 | {"text_config": {"num_hidden_layers": 3}},
    "mini-blip2-t5": BLIP2 | {"text_config": {"num_layers": 2, "num_decoder_layers": 2}},
    "mini-llama-vision": {
        "vision_config": {"num_hidden_layers": 1, "intermediate_layers_indices": [0]},
        "text_config": {"num_hidden_layers": 2, "cross_attention_layers": [1]},
    },
}
# where each number of layers counts
LAYERS = {
    "vision_config.num_hidden_layers": r"vision_model\.(?:encoder|transformer)\.layers",
    "qformer_config.num_hidden_layers": r"qformer\.encoder\.layer",
    "text_config.num_hidden_layers": r"language_model\.model\.(?:decoder\.)?layers",
    "text_config.num_layers": r"language_model\.encoder\.block",
    "text_config.num_decoder_layers": r"language_model\.decoder\.block",
}


@functools.cache
def shallow(name: str) -> Path:
    """A folder with the model, which this process makes and removes."""
    parent = Path(tempfile.mkdtemp(prefix="catp-jax-shallow-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = parent / name
    shutil.copytree(ASSETS / name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    limits = {}
    for part, changes in CUT[name].items():
        config[part] |= changes
        limits |= {LAYERS[f"{part}.{key}"]: size for key, size in changes.items() if "num" in key}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(ASSETS / name / "model.safetensors")
    for layers, size in limits.items():
        own = {key: re.match(rf"{layers}\.(\d+)\.", key) for key in weights}
        weights = {k: w for k, w in weights.items() if not own[k] or int(own[k][1]) < size}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
