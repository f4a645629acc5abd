"""Which ids stand for what, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from serving.items.vocabulary import Vocabulary


def test_every_level_has_a_block_of_its_own():
    vocabulary = Vocabulary(max_steps=2, codebook_sizes=(4, 3), reasoning_codes=5)
    assert vocabulary.start_tokens == [2, 3, 4]
    assert vocabulary.level_ranges == ((5, 9), (9, 12)) and vocabulary.item_range == (5, 12)
    assert vocabulary.reasoning_range == (12, 17) and vocabulary.size == 17
    assert vocabulary.tokens_of(np.array([[3, 2]])).tolist() == [[8, 11]]


def test_levels_of_one_codebook_have_one_block():
    vocabulary = Vocabulary(max_steps=2, codebook_sizes=(4, 4, 4, 2), reasoning_codes=5, shared_levels=3)
    assert vocabulary.level_ranges == ((5, 9), (5, 9), (5, 9), (9, 11)) and vocabulary.item_range == (5, 11)
    assert vocabulary.reasoning_range == (11, 16) and vocabulary.size == 16
    assert vocabulary.tokens_of(np.array([[3, 3, 0, 1]])).tolist() == [[8, 8, 5, 10]]


@pytest.mark.parametrize("shared_levels", [0, 1, 2, 3])
def test_the_layout_survives_json(shared_levels):
    vocabulary = Vocabulary(3, (4, 4, 4), 0, shared_levels)
    stored = json.loads(json.dumps(vocabulary.to_json()))
    assert Vocabulary.from_json(stored) == vocabulary
    assert stored["level_offsets"] == vocabulary.level_offsets.tolist() and stored["size"] == vocabulary.size


def test_a_layout_of_the_first_format_shares_nothing():
    assert Vocabulary.from_json({"max_steps": 1, "codebook_sizes": [2, 2], "reasoning_codes": 1}).shared_levels == 0


@pytest.mark.parametrize(("sizes", "shared_levels"), [((4, 3), 2), ((4, 4), 3), ((4, 4), -1)])
def test_levels_that_cannot_share_a_block_are_refused(sizes, shared_levels):
    with pytest.raises(ValueError, match="levels"):
        Vocabulary(1, sizes, 0, shared_levels)
