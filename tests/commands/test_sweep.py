from rlbench.commands.sweep import sweep_objective
from rlbench.tracking.jsonl import JsonlWriter


def write(folder, rewards, accuracies=()):
    writer = JsonlWriter(folder / "metrics.jsonl")
    for step, reward in enumerate(rewards, start=1):
        writer.write(step, {"reward/mean": reward})
    for step, accuracy in enumerate(accuracies):
        writer.write(step, {"eval/accuracy": accuracy}, phase="eval")
    writer.close()


def test_a_training_metric_is_the_mean_of_the_last_quarter(tmp_path):
    write(tmp_path, [0.0] * 6 + [0.5, 1.0])

    assert sweep_objective(tmp_path, "reward/mean") == 0.75


def test_an_evaluation_is_the_last_ones(tmp_path):
    write(tmp_path, [0.0], [0.9, 0.25])

    assert sweep_objective(tmp_path, "eval/accuracy") == 0.25


def test_steps_without_the_metric_do_not_count(tmp_path):
    write(tmp_path, [0.5, None, float("nan")])

    assert sweep_objective(tmp_path, "reward/mean") == 0.5


def test_what_was_not_recorded_is_said(tmp_path, capsys):
    assert sweep_objective(tmp_path, "eval/accuracy") is None
    assert "tracking.objective is eval/accuracy, which" in capsys.readouterr().err
