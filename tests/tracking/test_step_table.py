"""Step lines are aligned, fit the width, and say what they leave out."""

import pytest

from rlbench.tracking.step_table import StepTable

METRICS = {
    "reward/mean": 1.234,
    "reward/accuracy": 0.5,
    "reward/format": 0.25,
    "accuracy/train": 0.5,
    "completion/length_tokens_mean": 212.4,
    "groups/no_signal_frac": 0.25,
    "kl/reference": 0.0123,
    "loss/clip_frac": 0.004,
    "optim/grad_norm": 0.87,
    "optim/lr": 1e-5,
    "tokens/generation_per_s": 21733.0,
    "tokens/training_per_s": 812.0,
    "time/step_s": 12.4,
}


def test_every_value_stands_under_its_title():
    before, line = StepTable().lines(7, 100, METRICS, 3725.0, 120)
    titles = before[-1].split()
    cells = line.split()
    assert dict(zip(titles, cells, strict=True)) == {
        "step": "7/100",
        "reward": "1.234",
        "accuracy": "0.500",
        "format": "0.250",
        "len": "212",
        "nosig": "25%",
        "KL": "0.0123",
        "clip": "0.4%",
        "grad": "0.870",
        "lr": "1.0e-05",
        "gen/s": "21.7k",
        "train/s": "812",
        "time": "12s",
        "ETA": "1h02m",
    }
    ends = [before[-1].index(f"{title}") + len(title) for title in ("format", "train/s", "ETA")]
    assert [line[:end].split()[-1] for end in ends] == ["0.250", "812", "1h02m"]


@pytest.mark.parametrize("num_components", [2, 3, 4])
def test_all_columns_fit_120_with_two_to_four_components(num_components):
    names = ["accuracy", "format", "language", "a_very_long_name"][:num_components]
    metrics = METRICS | {f"reward/{name}": -12.3456 for name in names}
    before, line = StepTable().lines(1000, 1000, metrics, 99 * 86400.0, 120)
    assert max(len(text) for text in [before[-1], line]) <= 120
    assert not any("left out" in text for text in before)
    assert before[-1].endswith("ETA")


def test_at_80_columns_the_rightmost_are_left_out_and_named_once():
    table = StepTable()
    before, line = table.lines(1, 1000, METRICS, 60.0, 80)
    assert len(before[-1]) <= 80 and len(line) <= 80
    shown, left_out = before[-1].split(), before[0].split(": ")[1].split(" (")[0].split(", ")
    assert left_out[-1] == "ETA" and not set(shown) & set(left_out) and shown[:2] == ["step", "reward"]
    for step in range(2, 30):
        later, _ = table.lines(step, 1000, METRICS, 60.0, 80)
        assert not any("left out" in text for text in later)


def test_the_header_comes_every_20_lines_and_when_columns_change():
    table = StepTable()
    with_header = [bool(table.lines(step, 99, METRICS, None, 120)[0]) for step in range(1, 42)]
    assert [index for index, has in enumerate(with_header) if has] == [0, 20, 40]
    before, _ = table.lines(42, 99, METRICS | {"reward/new": 1.0}, None, 120)
    assert "new" in before[-1].split()
    before, line = table.lines(43, 99, {"reward/mean": None, "optim/grad_norm": float("nan")}, None, 120)
    assert before == [] and line.split()[1] == "-" and "nan" in line.split()


def test_accuracy_is_shown_once():
    titles = StepTable().lines(1, 9, METRICS, None, 120)[0][-1].split()
    assert "acc" not in titles
    only = {"reward/mean": 1.0, "accuracy/train": 0.25}
    before, line = StepTable().lines(1, 9, only, None, 120)
    assert "acc" in before[-1].split() and "25.0%" in line.split()
    assert "KL" not in before[-1].split()
