"""The summary claims what the numbers show, and no more."""

import math

import pytest

from rlbench.tracking.run_clock import RunClock
from rlbench.tracking.run_summary import AccuracyChange, accuracy_lines, learning_lines, phase_lines, quarter_change


def test_quarters_are_compared_as_computed_by_hand():
    change = quarter_change([0.0, 0.2, 5.0, 5.0, 5.0, 5.0, 0.4, 0.8])
    assert change is not None
    assert (change.first, change.last, change.difference) == pytest.approx((0.1, 0.6, 0.5))
    # variances 0.02 and 0.08, two values each: 2 sqrt(0.01 + 0.04)
    assert change.two_standard_errors == pytest.approx(2 * math.sqrt(0.05))
    assert change.verdict == "rose"


def test_noise_and_falls_are_called_by_their_name():
    noise = quarter_change([0.0, 1.0, 0, 0, 0, 0, 0.1, 1.0])
    fall = quarter_change([1.0, 0.9, 0, 0, 0, 0, 0.1, 0.2])
    assert noise is not None and noise.verdict == "no clear change"
    assert fall is not None and fall.verdict == "fell"


def test_missing_values_are_left_out_and_short_runs_say_so():
    assert quarter_change([1.0] * 7) is None
    assert quarter_change([None, 1.0, 0, 0, 0, 0, 1.0, 1.0]) is None
    assert "3 steps are too few" in learning_lines([{"reward/mean": 1.0}] * 3)[0]
    assert "1 step is too few" in learning_lines([{"reward/mean": 1.0}])[0]


def test_each_component_and_what_was_left_out_is_reported():
    history = [
        {"reward/mean": step / 10, "reward/accuracy": 0.5, "reward/timeout_frac": 0.01, "groups/no_signal_frac": 0.0}
        for step in range(8)
    ]
    text = "\n".join(learning_lines(history))
    assert "first 2 steps -> last 2 steps" in text
    assert "0.050 ->   0.650  +0.600" in text and "rose" in text
    assert "accuracy" in text and "no clear change" in text
    assert "1.0% of rollouts had a verifier that timed out" in text
    assert "equal rewards" not in text and "broke" not in text


def change(before, after, n=100, **pairs):
    return AccuracyChange(name="test", correct_before=before, num_before=n, correct_after=after, num_after=n, **pairs)


def test_accuracy_is_given_with_intervals_and_an_honest_sentence():
    first, verdict = accuracy_lines(change(21, 34))
    assert "21.0% (14.2 to 30.0, 21 of 100) -> 34.0% (25.5 to 43.7, 34 of 100), +13.0 points" in first
    assert "better by more than chance" in verdict
    assert "NOT larger than chance" in accuracy_lines(change(21, 26))[1]
    assert "WORSE" in accuracy_lines(change(50, 20))[1]


def test_pairs_decide_when_they_are_known():
    # 5 gained, 0 lost: p = 2/32 = 0.0625; 6 gained, 0 lost: p = 2/64 = 0.031
    assert "NOT larger than chance" in accuracy_lines(change(20, 25, num_gained=5, num_lost=0))[1]
    assert "better" in accuracy_lines(change(20, 26, num_gained=6, num_lost=0))[1]
    assert "p = 0.031" in accuracy_lines(change(20, 26, num_gained=6, num_lost=0))[1]


def test_time_by_phase_adds_up_and_nested_phases_count_once():
    now = [0.0]
    clock = RunClock(lambda: now[0])
    with clock.phase("step"):
        now[0] += 1
        with clock.phase("generation"):
            now[0] += 6
        now[0] += 1
    now[0] += 2
    assert clock.phase_seconds == {"step": 2.0, "generation": 6.0}
    assert clock.all_seconds() == {"step": 2.0, "generation": 6.0, "between phases": 2.0}
    assert [line.split()[0] for line in phase_lines(clock.phase_seconds)] == ["generation", "step"]
    assert phase_lines(clock.phase_seconds)[0].split() == ["generation", "6.0s", "75%"]
    assert phase_lines({}) == []


def test_eta_is_the_mean_of_steps_times_what_remains_less_what_has_passed():
    now = [0.0]
    clock = RunClock(lambda: now[0])
    clock.begin(10)
    assert clock.eta_s() is None
    clock.step_done(1, 10, 4.0)
    assert clock.eta_s() == pytest.approx(36)
    now[0] = 6.0
    assert clock.step_done(2, 10, 4.0) == pytest.approx(6.0)  # an evaluation came between
    assert clock.eta_s() == pytest.approx(8 * 5)
    now[0] += 3
    assert clock.eta_s() == pytest.approx(8 * 5 - 3)
    now[0] += 300
    assert clock.eta_s() == pytest.approx(7 * 5)
    clock.step_done(10, 10, None)
    assert clock.eta_s() == 0
