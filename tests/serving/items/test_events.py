"""Events in histories: what is one, what is left out, and what each counts."""

from __future__ import annotations

import numpy as np
import pytest

from serving.items.events import gap_buckets, read_events, time_buckets, to_event
from serving.types import Event


def test_an_event_is_read_with_all_that_is_known() -> None:
    data = {"item_id": 7, "type": "purchase", "value": 9, "timestamp": 1.7e9}
    assert to_event(data) == Event("7", "purchase", 9.0, 1.7e9)
    assert to_event({"item_id": "007", "type": None, "value": None, "timestamp": None}) == Event("007")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"item_id": None}, "has an item_id that is missing"),
        ({"item_id": "x" * 300}, "has an item_id that has 300 characters"),
        ({"kind": "view"}, "has the unknown field 'kind'"),
        ({"type": ""}, "has a type that is not a text of 1 to 64"),
        ({"type": "x" * 65}, "has a type that is not a text of 1 to 64"),
        ({"type": 3}, "has a type that is not a text of 1 to 64"),
        ({"type": "\ud800"}, "has a type that is not a text of 1 to 64"),
        ({"value": "9"}, "has a value that is not a number"),
        ({"value": True}, "has a value that is not a number"),
        ({"value": float("nan")}, "has a value that is not a number"),
        ({"value": 10**400}, "has a value that is not a number"),
        ({"timestamp": -1}, "has a timestamp that is not in seconds"),
        ({"timestamp": 1.7e12}, "has a timestamp that is not in seconds"),
    ],
)
def test_what_is_no_event_says_why(fields: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        to_event({"item_id": "a"} | fields)


def test_a_history_of_ids_is_left_as_it_is() -> None:
    history = ["a", "b", "a"]
    ids, events = read_events(history, [("view", 0.0)])
    assert ids is history and events is None


def test_types_weigh_and_those_of_weight_0_are_left_out() -> None:
    history = [
        "a",
        Event("b", "view", timestamp=9),
        Event("c", "purchase"),
        Event("d", "click", timestamp=5),
        Event("e"),
    ]
    ids, events = read_events(history, [("view", 0.0), ("purchase", 2.5)])
    assert ids == ["a", "c", "d", "e"]
    np.testing.assert_array_equal(events.weights, np.array([1, 2.5, 1, 1], np.float32))
    np.testing.assert_array_equal(events.times, [np.nan, np.nan, 5, np.nan])


def test_times_fall_into_buckets_that_double() -> None:
    seconds = [0, 0.5, 1, 2.9, 3, 59, 60, 3600, 86_400, 2**29 - 1, 2**30, 1e11, -5, np.nan]
    assert gap_buckets(np.array(seconds)).tolist() == [1, 1, 2, 2, 3, 6, 6, 12, 17, 30, 31, 31, 1, 0]


def test_times_count_from_the_newest_event_whose_time_is_known() -> None:
    times = [None, np.array([8.0, 1, np.nan, 9, 5, np.nan]), np.full(2, np.nan), np.empty(0)]
    found = time_buckets(times, max_items=5, width=6)
    assert found.tolist() == [[0] * 6, [3, 0, 1, 1, 0, 0], [0] * 6, [0] * 6]  # 4 s; unknown; after the newest; itself
