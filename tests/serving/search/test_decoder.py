"""The order of candidates, which everything that the search keeps follows from."""

from __future__ import annotations

import numpy as np
import torch

from serving.search.decoder import stable_topk


def test_the_highest_come_first_and_equal_ones_by_their_tie_break():
    inf = float("inf")
    one, more = np.float32(1), np.nextafter(np.float32(1), np.float32(2))  # neighbours among the floats
    scores = torch.tensor([[one, more, -inf, -one, -more, more, 0.0, inf]])
    largest = 2**31 - 1
    tie_break = torch.tensor([[0, largest, 5, 6, 0, largest - 1, 7, largest]])
    assert stable_topk(scores, tie_break, 8).tolist() == [[7, 5, 1, 0, 6, 3, 4, 2]]
    assert stable_topk(scores, None, 8).tolist() == [[7, 1, 5, 0, 6, 3, 4, 2]]
    assert stable_topk(scores[:, :7], None, 1).tolist() == [[1]]


def test_the_order_is_that_of_a_sort():
    rng = np.random.default_rng(0)
    scores = rng.choice(rng.standard_normal(40).astype(np.float32) * 1e-3 - 7, (5, 200))  # every score several times
    tie_break = np.stack([rng.permutation(200) for _ in range(5)])
    found = stable_topk(torch.from_numpy(scores), torch.from_numpy(tie_break), 90)
    expected = np.stack([np.lexsort((ties, -row))[:90] for row, ties in zip(scores, tie_break, strict=True)])
    np.testing.assert_array_equal(found.numpy(), expected)
