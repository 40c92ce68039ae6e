"""Which charts a run gets, and what they hold."""

from pathlib import Path

from rlbench.report.curves import charts_of
from rlbench.report.run_folder import RunRecord


def charts(train=(), evaluations=()):
    shown, _ = charts_of(RunRecord(folder=Path("run"), train=list(train), evaluations=list(evaluations)))
    return {chart.title: {c.label: list(c.values) for c in chart.curves} for chart in shown}


def test_sampled_accuracy_and_pass_at_k_stand_beside_greedy_with_their_bars():
    rows = [
        {"step": step, "eval/accuracy": 0.1, "eval/sampled_accuracy": 0.2, "eval/sampled_accuracy_low": 0.15,
         "eval/sampled_accuracy_high": 0.25, "eval/pass_at_4": 0.5, "eval/pass_at_4_low": 0.4}
        for step in (0, 10)
    ]  # fmt: skip
    run = RunRecord(folder=Path("run"), train=[], evaluations=rows)
    (accuracy,) = (chart for chart in charts_of(run)[0] if chart.title == "Accuracy")
    by_label = {c.label: c for c in accuracy.curves}

    assert list(by_label)[-3:] == ["held out, greedy", "held out, sampled", "held out, pass@4"]
    assert by_label["held out, sampled"].high == [0.25, 0.25] and by_label["held out, pass@4"].low == [0.4, 0.4]
    assert all(by_label[label].is_points for label in list(by_label)[-3:])


def test_greedy_alone_gets_no_other_curve():
    assert list(charts(evaluations=[{"step": 0, "eval/accuracy": 0.1}])["Accuracy"]) == ["held out, greedy"]


def test_a_curriculum_and_a_replay_are_drawn_where_they_were_recorded():
    train = [
        {"step": step, "curriculum/measured_frac": 0.1 * step, "curriculum/expected_signal_frac": 0.6,
         "replay/groups_frac": 0.25, "replay/age_mean": 3.0, "replay/age_max": 7.0}
        for step in (1, 2)
    ]  # fmt: skip
    found = charts(train)

    assert found["Curriculum"]["sampled so far"] == [0.1, 0.2]
    assert found["Replayed successes"] == {"with a replayed completion": [0.25, 0.25]}
    assert found["Age of replayed successes"] == {"mean": [3.0, 3.0], "oldest": [7.0, 7.0]}
    assert not {"Curriculum", "Replayed successes"} & set(charts([{"step": 1, "reward/mean": 0.1}]))
