"""`diff` as a user calls it."""

import re

import pytest

from rlbench.commands.diff import diff
from tests.report.conftest import make_group, write_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    a = write_run(tmp_path / "a", config={"name": "demo", "optim": {"lr": 1e-4}, "training": {"num_steps": 10}})
    b = write_run(
        tmp_path / "b",
        num_steps=6,
        train=lambda step: {"reward/mean": 0.05 * step},
        config={"name": "demo", "optim": {"lr": 3e-4}, "training": {"num_steps": 10}},
        groups=lambda step: [make_group(step, texts=("\x1b[2Jsix", "[red]x"), rewards=(0.25, 0.0))],
    )
    return a, b


def test_settings_numbers_curves_samples_and_the_page_are_there(runs, capsys):
    a, b = runs
    assert diff([str(a), str(b)]) == 0
    out = capsys.readouterr().out

    assert re.search(r"B +6 of 10 +", out)
    assert re.search(r"optim\.lr +0\.0001 +0\.0003 +A: because", out)
    assert "means over steps 5 to 6" in out and re.search(r"reward/mean +0\.550 +0\.275 +-0\.275", out)
    assert re.search(r"reward/mean +A +▁.*█ +1\.00 +0\.100 to 1\.00", out)
    assert "A: reward 1.000, 1 tokens" in out and "B: reward 0.250, 1 tokens" in out
    assert "\\x1b[2Jsix" in out and "\x1b" not in out
    assert (a.parent / "comparison.html").exists() and str(a.parent / "comparison.html") in out


def test_a_shorter_run_has_a_shorter_curve(runs, capsys):
    diff([*map(str, runs), "--samples", "0"])
    out = capsys.readouterr().out

    a, b = (re.search(rf"{label} +([▁-█]+) +[\d.]+ +0\.\d+ to", part).group(1) for label, part in (
        ("A", out[out.index("Curves"):]), ("B", out[out.index("Curves"):])))  # fmt: skip
    assert len(b) == 6 and len(a) == 10 and "The same prompts" not in out


def test_keys_stay_whole_in_a_narrow_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    folders = [
        write_run(
            tmp_path / name,
            train=lambda step: {"completion/length_tokens_mean": 7.0 * step},
            config={"name": "demo", "training": {"tokens_per_microbatch": size}},
        )
        for name, size in (("a", 4096), ("b", 4096 * 10**30))
    ]

    diff([*map(str, folders), "--samples", "0"])
    lines = capsys.readouterr().out.split("\npage ")[0].splitlines()

    keys = [line.split()[0] for line in lines if line.startswith("  ") and line.strip()]
    assert "training.tokens_per_microbatch" in keys and keys.count("completion/length_tokens_mean") == 2
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["{a}", "{a}"], "RUN_A and RUN_B are both"),
        (["{a}", "{a}/none"], "there is no folder"),
        (["{a}", "{a}/config.yaml"], "config.yaml is a file, expected the folder of a run"),
        (["{a}", "{a}/.."], "it has no metrics.jsonl; runs below it are a, b"),
        (["{a}", "{a}/rollouts"], "is not the folder of a run: it has no metrics.jsonl"),
    ],
)
def test_a_wrong_folder_gets_one_sentence(runs, capsys, arguments, sentence):
    assert diff([argument.format(a=runs[0]) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_a_run_without_a_step_yet_can_be_compared(runs, tmp_path, capsys):
    fresh = tmp_path / "c"
    fresh.mkdir()
    (fresh / "metrics.jsonl").write_text("")

    assert diff([str(runs[0]), str(fresh)]) == 0
    out = capsys.readouterr().out
    assert "the runs have no step in common" in out and "C: " not in out and "holds no metrics yet" in out


def test_unreadable_metrics_are_counted_or_refused(runs, tmp_path, capsys):
    damaged = tmp_path / "c"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text('nonsense\n{"step": 1, "phase": "train", "reward/mean": 0.5}\n')

    assert diff([str(runs[0]), str(damaged)]) == 0
    assert "B: 1 line of metrics.jsonl was unreadable and left out: line 1." in capsys.readouterr().err

    (damaged / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert diff([str(runs[0]), str(damaged)]) == 2
    assert "metrics.jsonl holds no metrics: line 1 is no JSON object" in capsys.readouterr().err


def test_a_page_below_a_file_is_one_sentence(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("x")

    assert diff([*map(str, runs), "--out", str(tmp_path / "file" / "page.html")]) == 4
    assert "cannot write the report to" in capsys.readouterr().err
