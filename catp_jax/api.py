"""The front door: `load` a checkpoint folder, `generate` answers about images.

model = catp_jax.load("path/to/folder")
model.generate(images=["a.png"], prompts=["what color is the shape?"]).text
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import convert
from catp_jax.families import family_of
from catp_jax.generation.contrast import check_contrast
from catp_jax.model import Model
from catp_jax.models.cross_decoder import MaskMode
from catp_jax.models.frozen import freeze
from catp_jax.models.narrow import Weights
from catp_jax.models.tiled_vit import VisionMode
from catp_jax.readers import hub
from catp_jax.readers.images import Fetch
from catp_jax.readers.reading import special_tokens
from catp_jax.readers.seen import Seen
from catp_jax.sharding import place
from catp_jax.sharding.mesh import MeshLike, find_devices, make_mesh


def load(
    folder: str | Path,
    dtype: str | None = None,
    *,
    mesh: MeshLike | None = None,
    weights: Weights | None = None,
    vision_mode: VisionMode | None = None,
    mask_mode: MaskMode | None = None,
    ignore_config: Sequence[str] = (),
    adapter: str | Path | None = None,
    generation_config: bool = True,
    processor: str | Path | None = None,
    image_scale: float = 1.0,
    tiles: int | None = None,
    contrast: float | None = None,
    plausible: float | None = None,
    fetch: Fetch | None = None,
) -> Model:
    """Loads a Hugging Face folder of Llama 3.2 Vision, BLIP-2 or InstructBLIP, or one made of it
    by `catp-jax convert`. A name, org/name, is looked up in the local Hugging Face cache.

    `dtype` casts the weights: float32, bfloat16, float16; None: as stored, or float32 if
    config.json says so. `mesh` spreads the
    model over all devices: "data=2,tensor=4", see `sharding.rules`; each process reads the bytes of
    its own devices. `weights="int8"` (or "float8") narrows the language model's layers to 8 bits as
    they load, see `models.narrow`. The modes are Llama 3.2 Vision's: which states of the tower the
    decoder gets (as its config.json says, "meta" where that says nothing; see `tiled_vit`), and
    what text does that sees no image ("meta", see `cross_decoder.MaskMode`). config.json is read as
    if it had not the keys `ignore_config` ("text_config.x" for one of a part). A LoRA adapter,
    beside the weights or in the folder `adapter`, is merged into them. Without `generation_config`
    the folder's file of that name sets no defaults.

    `processor` is another folder or name to take tokenizer and image processor from. `image_scale`
    makes images smaller before the model sees them, and `tiles` is how many an image has at most;
    a loaded model's `seeing` changes both, see `readers.seen`. `contrast` and `plausible` are alpha
    and beta of `contrasting`. `fetch` brings images at web addresses: it takes the address and
    returns bytes, or another image.

    Raises ValueError if the folder is not a checkpoint that is supported, with all reasons.
    """
    folder = hub.find_folder(folder)
    processor_folder = folder if processor is None else hub.find_folder(processor)
    adapter = None if adapter is None else hub.find_folder(adapter)
    find_devices()
    # before the weights, which may take minutes
    config = convert.load_config(folder, ignore_config)
    family = family_of(config, folder)
    defaults, note = family.defaults(folder, generation_config)
    seen = Seen(image_scale, tiles)
    seen.check(config)
    numbers = {"alpha": contrast, **({} if plausible is None else {"beta": plausible})}
    check_contrast(**numbers)
    modes = {"vision_mode": vision_mode, "mask_mode": mask_mode}
    whole: Any = family.load_reader(processor_folder, config, modes)
    reader = replace(whole, seen=seen)
    size = reader.config.text.vocab_size
    ends, pad = special_tokens(folder, reader.tokens, reader.has_generation_config, size)
    network, _ = convert.load(
        folder,
        dtype,
        None if mesh is None else partial(_spread, mesh),
        weights,
        ignore_config,
        adapter,
    )
    if pad is None:
        pad = reader.tokenizer.pad_token_id
    frozen = freeze(network)
    model = Model(
        network=frozen if mesh is None else place.sharded(frozen),
        reader=reader,
        end_tokens=ends,
        pad_token=ends[0] if pad is None else pad,
        defaults=defaults,
        note=note,
        fetch=fetch,
    )
    return model if contrast is None else model.contrasting(**numbers)


def _spread(mesh: MeshLike, model: Any) -> Any:
    """An abstract model on a mesh of all devices."""
    return place.place(model, make_mesh(mesh, place.kv_heads(model)))
