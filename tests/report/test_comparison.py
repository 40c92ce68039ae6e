"""Several runs on one page."""

import json

import pytest

from rlbench.commands.report import report
from rlbench.report.comparison import MAX_RUNS, write_comparison
from rlbench.tracking.rollout_store import write_rollouts
from tests.report.conftest import make_group, write_run


def make_run(folder, seed, lr, gain, right=()):
    config = {"name": "demo", "seed": seed, "optim": {"lr": lr, "name": "adamw"}}
    write_run(folder, 8, train=lambda step: {"reward/mean": gain * step}, config=config, groups=None)
    groups = [make_group(8, f"test/{i}", ("x",), (float(i in right),)) for i in range(10)]
    write_rollouts(folder, 8, groups, {}, phase="eval")
    return folder


def test_a_sweep_becomes_one_page_with_differences_and_paired_results(tmp_path, read_page, capsys):
    make_run(tmp_path / "0", 1, 1e-4, 0.1, right=(0, 1))
    make_run(tmp_path / "1", 2, 1e-4, 0.2, right=(0, 1))
    make_run(tmp_path / "2", 1, 3e-4, 0.3, right=(1, *range(2, 10)))

    assert report([str(tmp_path)]) == 0

    path = tmp_path / "comparison.html"
    assert capsys.readouterr().out == f"{path}\n"
    page = read_page(path)
    assert page.depth == [] and page.chart_titles[0] == "Mean reward"
    assert [curve["label"] for curve in page.data["charts"][0]["curves"]] == ["0", "1", "2"]
    assert "8 gained, 1 lost of 10, p = 0.039: better" in page.text
    assert "0 gained, 0 lost of 10, p = 1: no more than chance" in page.text
    assert "optim.lr=0.0001" in page.text and "optim.name" not in page.text
    assert "1.125 ± 0.530" in page.text  # last two steps of the two seeds: means 0.75 and 1.5


def test_of_a_large_sweep_the_best_runs_are_shown_beside_the_first_and_the_rest_is_named(tmp_path, read_page, capsys):
    for number in range(200):
        folder = tmp_path / f"{number:03d}"
        folder.mkdir()
        rows = [{"step": s, "phase": "train", "reward/mean": number / 200} for s in range(1, 9 if number != 199 else 3)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    assert report([str(tmp_path)]) == 0

    page = read_page(tmp_path / "comparison.html")
    labels = [curve["label"] for curve in page.data["charts"][0]["curves"]]
    assert labels == ["000", *(f"{number:03d}" for number in range(200 - MAX_RUNS, 199))]  # 199 is too short to rank
    said = f"{200 - MAX_RUNS} of 200 runs are left out"
    assert said in page.text and f"note: {said}" in capsys.readouterr().err


def test_a_run_that_is_no_run_or_given_twice_is_said(tmp_path):
    first = make_run(tmp_path / "0", 1, 1e-4, 0.1)

    with pytest.raises(ValueError, match="is not the folder of a run"):
        write_comparison([first, tmp_path])
    with pytest.raises(ValueError, match="given twice"):
        write_comparison([first, first])


def test_runs_that_differ_in_nothing_are_said_to(tmp_path, read_page):
    runs = [make_run(tmp_path / name, 1, 1e-4, 0.1) for name in "ab"]

    assert "All settings are the same." in read_page(write_comparison(runs, tmp_path / "x.html")).text


def test_a_run_keeps_its_colour_in_charts_that_another_has_no_part_in(tmp_path):
    runs = [make_run(tmp_path / name, 1, 1e-4, 0.1) for name in "ab"]
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "phase": "train", "policy/entropy": 0.5}\n')

    page = write_comparison(runs, tmp_path / "x.html").read_text()

    entropy = page[page.index("Entropy of the policy") :]
    assert entropy.index('class="key c1"') < entropy.index("</figcaption>") and "mark c1" in entropy
