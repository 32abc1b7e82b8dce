"""From prompts and images to arrays: spans, buckets, places."""

import numpy as np
import pytest
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from catp_jax.generation.buckets import IMAGE_COUNTS, TEXT_LENGTHS, TILE_COUNTS, round_up
from catp_jax.readers.mllama_packing import ProcessedImage, image_spans, locate, pack
from catp_jax.readers.packing import image_room
from tests.random_mllama import AVAILABLE, CONFIG, IMAGE, PER_TILE, PROMPTS, packed, picture

# --- spans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [
        ([1, 2], []),
        ([IMAGE], [(0, 1)]),
        ([1, IMAGE, 2, 3], [(1, 4)]),
        ([IMAGE, 1, IMAGE, 2], [(0, 2), (2, 4)]),
        ([IMAGE, IMAGE, 1, 2], [(0, 4), (1, 4)]),
        ([IMAGE, IMAGE, 1, IMAGE, 2], [(0, 3), (1, 3), (3, 5)]),
        ([1, IMAGE, 2, IMAGE, IMAGE, IMAGE, 3], [(1, 3), (3, 7), (4, 7), (5, 7)]),
        ([1, IMAGE], [(1, 2)]),
        ([IMAGE, 1, IMAGE, IMAGE], [(0, 2), (2, 4), (3, 4)]),
    ],
)
def test_hand_made_spans(tokens: list[int], spans: list[tuple[int, int]]):
    assert image_spans(tokens, IMAGE) == spans


def test_what_a_row_sees_is_what_transformers_processor_says():
    rng = np.random.default_rng(0)
    most = CONFIG.vision.max_num_tiles
    for _ in range(60):
        length = int(rng.integers(1, 15))
        tokens = np.where(rng.random(length) < rng.choice([0.2, 0.5, 0.9]), IMAGE, 3).tolist()
        tiles = [int(rng.integers(1, most + 1)) for token in tokens if token == IMAGE]
        own = [picture(count, seed) for seed, count in enumerate(tiles)]
        if not own:
            continue
        batch = pack([tokens], [own], CONFIG, "hf")
        dense = convert_sparse_cross_attention_mask_to_dense(
            [get_cross_attention_token_mask(tokens, IMAGE)], [tiles], most, length
        )
        expected = dense[0].reshape(length, -1).astype(bool)
        seen = np.asarray(batch.inputs.images.tile_seen[0])
        np.testing.assert_array_equal(seen[:length, : expected.shape[1]], expected)
        assert not seen[length:].any()
        assert not seen[:, expected.shape[1] :].any()

        # "meta" packs the same without the padding tiles
        meta = pack([tokens], [own], CONFIG, "meta")
        real = [image * most + tile for image, tile in meta.tiles[0]]
        np.testing.assert_array_equal(
            np.asarray(meta.inputs.images.tile_seen[0])[:length, : len(real)], expected[:, real]
        )


# --- buckets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "rounded"), [(1, 16), (16, 16), (17, 24), (25, 32), (33, 48), (49, 64), (1000, 1024)]
)
def test_text_lengths_are_few(number: int, rounded: int):
    assert round_up(number, TEXT_LENGTHS) == rounded


def test_text_lengths_waste_at_most_half_and_reach_the_models_positions():
    assert TEXT_LENGTHS[-1] >= 131072
    sizes = np.asarray(TEXT_LENGTHS)
    assert (sizes[1:] <= 1.5 * sizes[:-1]).all()
    assert round_up(TEXT_LENGTHS[-1] + 1, TEXT_LENGTHS) == 2 * TEXT_LENGTHS[-1]


def test_counts_of_images_and_tiles_go_to_few_sizes_close_above():
    for sizes in (IMAGE_COUNTS, TILE_COUNTS):
        rounded = [round_up(number, sizes) for number in range(1, 3000)]
        assert all(size >= number for number, size in enumerate(rounded, 1))
        assert all(2 * size <= 3 * number for number, size in enumerate(rounded, 1) if number > 3)
        assert len(set(rounded)) < 30
    assert IMAGE_COUNTS[:7] == (1, 2, 3, 4, 6, 8, 12)
    assert TILE_COUNTS[:6] == (1, 2, 4, 6, 8, 12)


@pytest.mark.parametrize(
    ("number", "shares", "room"),
    [(5, 1, 6), (12, 8, 16), (3, 8, 8), (16, 8, 16), (17, 8, 24), (5, 4, 8), (7, 3, 9), (1, 8, 1)],
)
def test_images_are_so_many_that_all_devices_get_as_many(number: int, shares: int, room: int):
    assert image_room(number, shares) == room


def test_the_mixed_batch_has_the_shapes_of_its_buckets():
    inputs = packed().inputs
    assert inputs.tokens.shape == inputs.token_valid.shape == (5, 16)
    assert inputs.images.pixels.shape == (6, 4, 3, 12, 12)
    assert inputs.images.tile_index.shape == (5, 8)  # 7 tiles at most
    assert inputs.images.tile_seen.shape == (5, 16, 8)
    for row, tokens in enumerate(PROMPTS):
        size = len(tokens)
        assert inputs.tokens[row, :size].tolist() == list(tokens)
        assert inputs.token_valid[row].tolist() == [True] * size + [False] * (16 - size)


def test_prompts_have_their_own_tiles_first_and_no_padding_tile():
    batch = packed()
    assert batch.tiles[3] == ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3))
    assert batch.tiles[2] == ()
    assert batch.available == AVAILABLE
    assert batch.capacity == 8 * PER_TILE
    assert batch.longest == 9
    valid = np.asarray(batch.inputs.images.tile_valid)
    for row, tiles in enumerate(batch.tiles):
        assert valid[row].tolist() == [True] * len(tiles) + [False] * (8 - len(tiles))


def test_tile_numbers_point_at_the_images_pixels():
    batch = packed()
    images = batch.inputs.images
    tiles = np.asarray(images.pixels).reshape(-1, 3, 12, 12)
    rebuilt = {
        (3, 1): picture(1, 13),
        (1, 0): picture(4, 11),
        (4, 0): picture(2, 15),
    }
    for (row, number), expected in rebuilt.items():
        for place, (image, tile) in enumerate(batch.tiles[row]):
            if image == number:
                index = int(images.tile_index[row, place])
                np.testing.assert_array_equal(tiles[index], expected.pixels[tile])


def test_mode_hf_gives_every_prompt_all_tiles_of_as_many_images_as_the_richest():
    batch = packed(mode="hf")
    assert all(len(tiles) == 12 for tiles in batch.tiles)
    assert batch.available == AVAILABLE  # tiles of padding are nobody's visual tokens
    assert batch.inputs.mask_mode == "hf"
    valid = np.asarray(batch.inputs.images.tile_valid)
    assert valid.sum(axis=1).tolist() == [12] * 5
    # but no row sees a tile that is padding
    seen = np.asarray(batch.inputs.images.tile_seen).any(axis=1)
    assert seen.sum(axis=1).tolist() == [1, 4, 0, 7, 2]


def test_a_batch_without_images_has_none():
    batch = pack([[1, 2], [3]], [[], []], CONFIG)
    assert batch.inputs.images is None
    assert batch.available == (0, 0)
    assert batch.capacity == 0


def test_an_image_in_several_prompts_is_encoded_once():
    shared = picture(4, 1)
    batch = pack(
        [[IMAGE, 1], [2, IMAGE], [IMAGE, IMAGE]], [[shared], [shared], [shared] * 2], CONFIG
    )
    images = batch.inputs.images
    assert images.pixels.shape[0] == 1
    assert images.tile_index.tolist()[2] == [0, 1, 2, 3, 0, 1, 2, 3]
    apart = pack([[IMAGE, 1], [2, IMAGE]], [[picture(4, 1)], [picture(4, 1)]], CONFIG)
    assert apart.inputs.images.pixels.shape[0] == 2


def test_images_beyond_the_last_are_blank_with_one_tile_that_counts():
    own = [picture(4, seed) for seed in range(5)]
    images = pack([[IMAGE] * 5], [own], CONFIG).inputs.images
    blank = ProcessedImage.padding(CONFIG)
    assert (blank.aspect_ratio_id, blank.num_tiles) == (0, 0)
    assert not np.asarray(images.pixels[5:]).any()
    assert images.aspect_ratio_ids[5:].tolist() == [0]
    assert images.aspect_ratio_mask[5:].tolist() == [[True, False, False, False]]
    assert images.aspect_ratio_mask[1].tolist() == [True] * 4


@pytest.mark.parametrize("mode", ["meta", "hf"])
@pytest.mark.parametrize(
    ("prompts", "counts", "says"),
    [
        ([[1, 2], []], [0, 0], "prompt 1.*empty"),
        ([[1, 2]], [1], "0 <|image|> marks and 1 images"),
        ([[IMAGE, 2]], [0], "1 <|image|> marks and 0 images"),
        ([[IMAGE, IMAGE, 2]], [1], "2 <|image|> marks and 1 images"),
        ([[IMAGE], [IMAGE, 4, IMAGE]], [1, 3], "prompt 1.*2 <|image|> marks and 3 images"),
    ],
)
def test_marks_that_do_not_fit_the_images_are_refused(mode, prompts, counts, says):
    images = [[picture(1, seed) for seed in range(count)] for count in counts]
    with pytest.raises(ValueError, match=says.replace("|", r"\|")):
        pack(prompts, images, CONFIG, mode)


# --- places -----------------------------------------------------------------------------------


def test_locate_by_hand():
    # A tile is a class token and 3×3 patches. The prompt has tiles (0, 0), (0, 1), (1, 0).
    numbers = np.asarray([0, 1, 3, 4, 9, 10, 15, 20, 29])
    places = locate(numbers, [(0, 0), (0, 1), (1, 0)], CONFIG)
    assert places.number.tolist() == numbers.tolist()
    assert places.image.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert places.tile.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert places.row.tolist() == [-1, 0, 0, 1, 2, -1, 1, -1, 2]
    assert places.column.tolist() == [-1, 0, 2, 0, 2, -1, 1, -1, 2]


def test_locate_nothing():
    places = locate(np.asarray([], np.int64), [], CONFIG)
    assert places.number.tolist() == places.image.tolist() == places.row.tolist() == []


def test_every_visual_token_has_a_place_of_its_own():
    batch = packed()
    for tiles, available in zip(batch.tiles, batch.available, strict=True):
        places = locate(np.arange(available), tiles, CONFIG)
        four = set(zip(places.image, places.tile, places.row, places.column, strict=True))
        assert len(four) == available
