"""BLIP-2: from prompts and images to arrays."""

import numpy as np
import pytest

from catp_jax.readers.blip2_packing import KeptQueries, pack, stack_images
from tests.random_blip2 import CONFIGS, IMAGES, PHOTOS, PROMPTS, QUERIES, packed, photo


def test_prompts_are_padded_on_the_right_to_a_length_of_few():
    inputs = packed().inputs
    assert inputs.tokens.shape == inputs.token_valid.shape == (4, 16)
    for row, tokens in enumerate(PROMPTS):
        assert inputs.tokens[row, : len(tokens)].tolist() == list(tokens)
        assert inputs.token_valid[row].tolist() == [n < len(tokens) for n in range(16)]
    longer = pack([*PROMPTS, (3,) * 17], [*IMAGES, PHOTOS[0]], CONFIGS["opt"])
    assert longer.inputs.tokens.shape == (5, 24)


def test_an_image_of_several_prompts_is_encoded_once():
    inputs = packed().inputs
    assert inputs.pixels.shape[0] == 3
    for row, image in enumerate(IMAGES):
        np.testing.assert_array_equal(inputs.pixels[int(inputs.image_index[row])], image)
    assert inputs.image_index[0] == inputs.image_index[1]


def test_images_are_filled_up_to_a_number_of_few_with_blanks():
    pixels, index = stack_images([photo(seed) for seed in range(5)])
    assert pixels.shape[0] == 6
    assert not pixels[5].any()
    assert index.tolist() == [0, 1, 2, 3, 4]


def test_every_prompt_has_all_queries_and_the_longest_counts_them():
    batch = packed()
    assert batch.available == (QUERIES,) * 4
    assert batch.most == batch.capacity == QUERIES
    assert batch.longest == QUERIES + max(len(tokens) for tokens in PROMPTS)


@pytest.mark.parametrize("prompts", [[[]], [[1], [2, 3], []]])
def test_an_empty_prompt_is_padding_behind_the_queries(prompts: list[list[int]]):
    batch = pack(prompts, [photo(0)] * len(prompts), CONFIGS["t5"])
    assert batch.inputs.token_valid.sum(axis=1).tolist() == [len(tokens) for tokens in prompts]
    assert batch.longest == QUERIES + max(len(tokens) for tokens in prompts)


def test_kept_queries_are_rows_of_plain_numbers():
    rows = KeptQueries(np.asarray([0, 3, 6])).as_rows()
    assert rows == [{"query": 0}, {"query": 3}, {"query": 6}]
    assert all(type(row["query"]) is int for row in rows)
