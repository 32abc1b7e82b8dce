"""Pictures show the right patches."""

import numpy as np

from catp_jax.generation.inputs import ProcessedImage, locate
from catp_jax.models.cross_decoder import CrossDecoderConfig
from catp_jax.models.mllama import MllamaConfig
from catp_jax.models.tiled_vit import TiledVitConfig
from catp_jax.study.pictures import Panel, canvas, draw_kept, kept_mask

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
)
CONFIG = MllamaConfig(VISION, CrossDecoderConfig.llama_3_2_11b(), 128256)
TWO_WIDE = 2  # the aspect ratio (1, 2): two tiles side by side


def test_tiles_come_together_as_they_were_cut():
    picture = np.arange(6 * 12 * 3, dtype=np.float32).reshape(6, 12, 3)
    tiles = np.zeros((4, 3, 6, 6), np.float32)
    tiles[0], tiles[1] = picture[:, :6].transpose(2, 0, 1), picture[:, 6:].transpose(2, 0, 1)
    whole = canvas(ProcessedImage(tiles, TWO_WIDE, 2), VISION)
    np.testing.assert_allclose(whole, picture / picture.max(), rtol=1e-6)


def test_kept_tokens_light_up_their_patches_and_class_tokens_none():
    # 5 tokens a tile: the class token, then patches row by row
    numbers = np.array([0, 2, 5 + 3])
    kept = locate(numbers, [(0, 0), (0, 1)], CONFIG)
    mask = kept_mask(kept, TWO_WIDE, VISION)
    np.testing.assert_array_equal(mask, [[0, 1, 0, 0], [0, 0, 1, 0]])


def test_a_figure_is_written(tmp_path):
    image = ProcessedImage(np.zeros((4, 3, 6, 6), np.float32), TWO_WIDE, 2)
    kept = locate(np.array([1]), [(0, 0), (0, 1)], CONFIG)
    panels = [[Panel(image, None, "all"), Panel(image, kept, "one")], [Panel(image, None, "x")]]
    draw_kept(panels, VISION, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 1000
