"""Examples and batches: nothing twice, nothing missing, the same again for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.examples import all_prefixes, all_windows, batch_at, epoch_batches

SEQUENCES = [np.array(s, dtype=np.int32) for s in ([5, 6, 7, 8], [9], [1, 2], [])]


def pairs(examples, index) -> list[tuple[tuple[int, ...], int]]:
    histories = [tuple(history.tolist()) for history in examples.histories(index)]
    return list(zip(histories, examples.targets(index).tolist(), strict=True))


def test_every_prefix_is_an_example_and_no_user_sees_another():
    examples = all_prefixes(SEQUENCES, max_items=2)
    found = pairs(examples, np.arange(len(examples)))
    assert sorted(found) == [((1,), 2), ((5,), 6), ((5, 6), 7), ((6, 7), 8)]


def test_users_without_a_second_event_alone_are_refused():
    with pytest.raises(ValueError, match="two training events"):
        all_prefixes(SEQUENCES[1:2], max_items=2)


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(lambda n: max(n) > 1)


@given(lengths=lengths, max_items=st.integers(1, 6), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_epoch_holds_every_prefix_once_grouped_by_length(lengths, max_items, batch_size, seed):
    sequences = np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])
    examples = all_prefixes(sequences, max_items)
    batches = epoch_batches(examples, batch_size, seed, epoch=0)
    expected = [
        (tuple(s[max(0, at - max_items) : at].tolist()), int(s[at])) for s in sequences for at in range(1, len(s))
    ]
    assert sorted(pairs(examples, np.concatenate(batches))) == sorted(expected)
    assert max(map(len, batches)) <= batch_size and len(batches) == -(-len(expected) // batch_size)
    spans = sorted(
        (min(found), max(found)) for found in ([len(h) for h in examples.histories(batch)] for batch in batches)
    )
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))  # lengths do not mix


@given(lengths=lengths, max_items=st.integers(1, 6), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_windows_hold_every_target_once_with_at_least_half_of_its_history(lengths, max_items, batch_size, seed):
    sequences = np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])
    windows = all_windows(sequences, max_items)
    batches = epoch_batches(windows, batch_size, seed, epoch=0)
    begins = {int(s[at]): at for s in sequences for at in range(1, len(s))}  # event -> events of the user before it
    seen = []
    for batch in batches:
        assert len(batch) == 1 or windows.counts[batch].sum() < batch_size + max_items
        most = int(windows.counts[batch].max())
        items, real, first = windows.items(batch, most + 1)  # padded by one target more than there is
        assert items.shape == (len(batch), first + most + 1) and not real[:, most].any()
        for row, counted in zip(items, real, strict=True):
            for target in np.flatnonzero(counted):
                item, history = int(row[first + target]), row[: first + target]
                assert min(begins[item], max_items // 2 + 1) <= len(history) <= max_items
                assert history.tolist() == list(range(item - len(history), item)) and len(history) <= begins[item]
                seen.append(item)
    assert sorted(seen) == sorted(begins)
    assert [len(batch) for batch in batches] != [] and len(batch_at(windows, batch_size, seed, 0)) == len(batches[0])


@pytest.mark.parametrize("form", [all_prefixes, all_windows])
def test_batches_follow_from_seed_epoch_and_step_alone(form):
    examples = form([np.arange(40, dtype=np.int32)] * 5, max_items=10)
    per_epoch = len(epoch_batches(examples, 16, 3, 0))
    laid_out = [epoch_batches(examples, 16, 3, epoch) for epoch in range(3)]
    order = np.random.default_rng(0).permutation(3 * per_epoch)  # asked for out of order, as after a resume
    for step in order:
        np.testing.assert_array_equal(
            batch_at(examples, 16, 3, int(step)), laid_out[step // per_epoch][step % per_epoch]
        )
    other_seed = epoch_batches(examples, 16, 4, 0)
    for other in (laid_out[1], other_seed):
        assert any(not np.array_equal(a, b) for a, b in zip(laid_out[0], other, strict=True))


def test_new_examples_never_get_the_batches_of_deleted_ones():
    for size in range(3, 60):
        examples = all_prefixes([np.arange(size, dtype=np.int32)], max_items=3)
        assert batch_at(examples, 10_000, 0, 0).tolist() != [] and len(batch_at(examples, 10_000, 0, 0)) == size - 1
        del examples  # the next may get its id
