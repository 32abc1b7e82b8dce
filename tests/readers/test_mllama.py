"""Llama Vision's reader: tiles come together again, kept tokens light up their patches."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from catp_jax.models.cross_decoder import CrossDecoderConfig
from catp_jax.models.mllama import MllamaConfig
from catp_jax.models.tiled_vit import TiledVitConfig
from catp_jax.readers.mllama import MllamaReader
from catp_jax.readers.mllama_packing import ProcessedImage, pack

MARK = 128256
VISION = TiledVitConfig(
    hidden_size=8,
    hidden_act="gelu",
    num_hidden_layers=1,
    num_global_layers=1,
    attention_heads=1,
    num_channels=3,
    intermediate_size=8,
    image_size=6,
    patch_size=3,
    norm_eps=1e-5,
    max_num_tiles=4,
    intermediate_layers_indices=(0,),
    supported_aspect_ratios=TiledVitConfig.llama_3_2().supported_aspect_ratios,
    vision_mode="meta",
)
CONFIG = MllamaConfig(VISION, CrossDecoderConfig.llama_3_2_11b(), MARK)
TWO_WIDE = 2  # the aspect ratio (1, 2): two tiles side by side


@pytest.fixture
def picture() -> np.ndarray:
    return np.arange(6 * 12 * 3, dtype=np.float32).reshape(6, 12, 3)


@pytest.fixture
def tiles(picture: np.ndarray) -> np.ndarray:
    tiles = np.zeros((4, 3, 6, 6), np.float32)
    tiles[0], tiles[1] = picture[:, :6].transpose(2, 0, 1), picture[:, 6:].transpose(2, 0, 1)
    return tiles


@pytest.fixture
def reader(tiles: np.ndarray) -> MllamaReader:
    """A reader whose processor always gives the same two tiles."""
    out = {
        "pixel_values": tiles[None, None],
        "aspect_ratio_ids": np.asarray([[TWO_WIDE]]),
        "num_tiles": [[2]],
    }
    processor = SimpleNamespace(image_processor=lambda images, return_tensors: out)
    return MllamaReader(CONFIG, processor)


def test_tiles_come_together_as_they_were_cut(reader: MllamaReader, picture: np.ndarray):
    whole = reader.picture(Image.new("RGB", (12, 6)))
    np.testing.assert_allclose(whole, picture / picture.max(), rtol=1e-6)


def test_kept_tokens_light_up_their_patches_and_class_tokens_none(
    reader: MllamaReader, tiles: np.ndarray
):
    # the second image of the batch: the map has to find its aspect ratio
    other = ProcessedImage(np.zeros_like(tiles), 1, 1)
    packed = pack(
        [[1, MARK, 2], [MARK, 3]], [[other], [ProcessedImage(tiles, TWO_WIDE, 2)]], CONFIG
    )
    # 5 tokens a tile: the class token, then patches row by row
    kept = reader.locate(packed, 1, np.array([0, 2, 5 + 3]))
    shown = reader.kept_map(None, packed, 1, kept)
    np.testing.assert_array_equal(shown, [[0, 1, 0, 0], [0, 0, 1, 0]])
    assert kept.as_rows()[1] == {"image": 0, "tile": 0, "row": 0, "column": 1}
