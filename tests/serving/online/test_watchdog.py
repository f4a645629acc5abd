"""The watchdog by a clock of the test's own: what is hung, and what is only slow, late or was stopped."""

from __future__ import annotations

from serving.online.watchdog import LOOK_EVERY, SLOWEST, Watchdog
from tests.serving.online.test_batcher import Clock


def looks(
    watchdog: Watchdog, clock: Clock, seconds: float, call: object | None, prediction: float = 0.0
) -> float | None:
    """Looks every LOOK_EVERY seconds, so many seconds long. Returns what the last look, or the first alarm, said."""
    for _ in range(round(seconds / LOOK_EVERY)):
        clock.now += LOOK_EVERY
        if (age := watchdog.look(call, prediction)) is not None:
            return age
    return None


def test_a_call_that_does_not_come_back_is_hung_after_the_patience() -> None:
    clock, call = Clock(), object()
    watchdog = Watchdog(30, clock)
    assert looks(watchdog, clock, 31, call) is None  # the first look only meets the call
    assert looks(watchdog, clock, 1, call) == 31


def test_calls_that_come_back_are_never_hung_and_neither_is_an_idle_engine() -> None:
    clock = Clock()
    watchdog = Watchdog(30, clock)
    for _ in range(10):
        assert looks(watchdog, clock, 25, object()) is None
    assert looks(watchdog, clock, 1000, None) is None
    call = object()
    assert looks(watchdog, clock, 25, call) is None and looks(watchdog, clock, 1, None) is None
    assert looks(watchdog, clock, 25, call) is None  # begins anew


def test_a_batch_predicted_to_be_long_may_take_longer() -> None:
    clock, call = Clock(), object()
    watchdog = Watchdog(30, clock)
    assert looks(watchdog, clock, 2 * SLOWEST, call, prediction=2.0) is None
    assert looks(watchdog, clock, 2, call, prediction=2.0) is not None


def test_a_process_that_was_stopped_ages_no_call() -> None:
    clock, call = Clock(), object()
    watchdog = Watchdog(30, clock)
    watchdog.look(call)
    ages = []
    for _ in range(17):
        clock.now += 86_400  # counts as two looks
        ages.append(watchdog.look(call))
    assert ages == [None] * 15 + [32, 34]
