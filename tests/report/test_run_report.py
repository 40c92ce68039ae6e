"""The page of a run: whole, self-contained, honest about what is missing, and safe whatever the model wrote."""

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlbench.commands.report import report, try_report
from rlbench.report.run_report import write_run_report
from tests.report.conftest import make_group, write_run

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "<!--<script>",
    "'-->]]>&lt;b&gt;\x1b[2J\x00\u202e\u2028",
    "</style><style>*{display:none}</style>",
]


def test_the_page_holds_curves_samples_settings_reasons_and_files(tmp_path, read_page):
    page = read_page(write_run_report(write_run(tmp_path / "run")))

    assert page.chart_titles == ["Reward", "Accuracy", "Time of a step by phase"]
    assert page.data["samples"]["reward"] == [1.0, 0.0] * 10
    assert page.data["samples"]["advantage"] == [1.25, None] * 10
    assert page.chunk(3)["texts"] == ["four", "five"] and page.chunk(3)["answers"] == {"train/7": "train/7 is 4"}
    assert "optim.lr" in page.text and "because" in page.text and "metrics.jsonl" in page.text
    assert page.depth == []  # every element is closed


def test_the_page_asks_for_nothing_and_its_policy_allows_only_its_own_code(tmp_path, read_page):
    page = read_page(write_run_report(write_run(tmp_path / "run")))

    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
        assert not {name for name in attributes if name.startswith("on") or name in ("style", "src")}
        assert (attributes.get("href") or "#").startswith("#")
    hashes = {name: base64.b64encode(hashlib.sha256(page.code[name].encode()).digest()).decode() for name in page.code}
    assert page.policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert "http://" not in page.raw and "https://" not in page.raw and "@import" not in page.raw
    assert "innerHTML" not in page.code["script"] and "eval(" not in page.code["script"]


def plain_tags(page) -> list[str]:
    return [tag for tag, _ in page.tags]


def test_hostile_text_of_model_config_and_metrics_adds_no_element(tmp_path, read_page):
    clean = read_page(write_run_report(write_hostile(tmp_path / "a", [f"text {i}" for i in range(6)])))
    hostile = read_page(write_run_report(write_hostile(tmp_path / "b", HOSTILE)))

    assert plain_tags(hostile) == plain_tags(clean)
    assert {name for _, a in hostile.tags for name in a} == {name for _, a in clean.tags for name in a}
    assert hostile.code == clean.code and hostile.depth == []
    assert "\x1b" not in hostile.raw and "\x00" not in hostile.raw and "\u202e" not in hostile.raw
    assert hostile.chunk(0)["texts"] == [text.replace("\ud800", "\\ud800") for text in HOSTILE]


def write_hostile(folder, texts):
    """A run with the texts as completions, prompts, answers, messages, component, metric and config keys and values."""
    return write_run(
        folder,
        2,
        train=lambda step: {f"reward/x{text}": 0.5 for text in texts} | {f"time/{text}_s": 1.0 for text in texts},
        config={"name": texts[0], "seed": 1, **{f"a{text}": text for text in texts}, "list": list(texts)},
        derived={f"a{text}": {"value": 1, "reason": text} for text in texts},
        groups=lambda step: [
            make_group(
                step,
                prompt_id=texts[1],
                texts=texts,
                rewards=[None, 1.0, 0.0, 1.0, 0.0, 1.0],
                message=texts[0],
                prompt=texts[2],
            )
        ],
    )


def test_what_was_not_recorded_is_left_out_not_drawn_as_zero(tmp_path, read_page):
    train = {"loss/clip_frac": 0.0, "policy/entropy": 1.0}
    page = read_page(write_run_report(write_run(tmp_path / "run", train=lambda step: train, groups=None)))

    assert "Entropy" in page.chart_titles and "Memory" not in page.chart_titles and "KL" not in page.chart_titles
    assert "Recorded and zero throughout: Clip share." in page.text
    assert "There are no rollouts to show" in page.text and 'id="explorer"' not in page.raw


def test_a_run_that_has_only_begun_has_a_page(tmp_path, read_page):
    (tmp_path / "metrics.jsonl").touch()

    page = read_page(write_run_report(tmp_path))

    assert "holds no metrics yet" in page.text and page.chart_titles == []


def test_damaged_lines_and_files_are_counted_and_said(tmp_path, read_page):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "rew\nnonsense\n')
    (folder / "rollouts" / "step-000002.parquet").write_bytes(b"PAR1 no more")
    (folder / "derived.json").write_text("{")

    page = read_page(write_run_report(folder))

    assert "2 lines of metrics.jsonl were unreadable and left out: line 12, 13." in page.text
    assert "step-000002.parquet: not a whole parquet file" in page.text
    assert "derived.json is damaged and was left out." in page.text
    assert len(page.data["samples"]["step"]) == 18


BAD_LINES = {
    "binary": b"\xff\x00\x80 \x9c",
    "cut": b'{"step": 3, "phase": "tr',
    "no object": b"[1, 2]",
    "no step": b'{"phase": "train", "reward/mean": 1.0}',
    "step is no number": b'{"phase": "train", "step": true}',
    "a step before the first": b'{"phase": "train", "step": -1}',
    "non_finite is no list": b'{"phase": "train", "step": 1, "non_finite": 3}',
    "no phase": b'{"step": 3, "reward/mean": 1.0}',
    "nested beyond reading": b"[" * 200_000,
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_among_good_ones_is_said_in_the_page_and_on_stderr(tmp_path, read_page, capsys, name):
    folder = write_run(tmp_path / "run", num_steps=4)
    metrics = folder / "metrics.jsonl"
    first, rest = metrics.read_bytes().split(b"\n", 1)
    metrics.write_bytes(first + b"\n" + BAD_LINES[name] + b"\n" + rest)

    assert report([str(folder)]) == 0

    sentence = "1 line of metrics.jsonl was unreadable and left out: line 2."
    assert capsys.readouterr().err == f"warning: {folder}: {sentence}\n"
    page = read_page(folder / "report.html")
    assert sentence in page.text and page.chart_titles


@pytest.mark.parametrize("name", BAD_LINES)
def test_metrics_without_one_whole_line_are_refused_by_file_and_line(tmp_path, capsys, name):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(b"\n" + BAD_LINES[name] + b"\n")

    assert report([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'metrics.jsonl'} holds no metrics: line 2 is no JSON object")
    assert error.count("\n") == 1 and not (folder / "report.html").exists()


def test_values_that_are_no_numbers_do_not_end_a_page(tmp_path, read_page, capsys):
    runs = [write_run(tmp_path / name) for name in "ab"]
    for run in runs:
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 11, "phase": "train", "reward/mean": {"a": 1}, "time/step_s": [1]}\n')
            file.write('{"step": 11, "phase": "eval", "eval/accuracy": "half", "eval/num": null}\n')
            file.write('{"step": 12, "phase": "eval", "eval/accuracy": NaN, "eval/accuracy_low": "x"}\n')

    assert report([str(runs[0])]) == 0
    assert report([str(tmp_path)]) == 0

    assert capsys.readouterr().err == ""
    assert "50.0%" in read_page(tmp_path / "comparison.html").text


def test_half_a_line_at_the_end_is_what_a_crash_leaves_and_no_warning(tmp_path, read_page, capsys):
    folder = write_run(tmp_path / "run", num_steps=4)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "phase": "train", "rew')

    assert report([str(folder)]) == 0

    assert capsys.readouterr().err == ""
    assert "unreadable" not in read_page(folder / "report.html").text


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: p / "nowhere", "error: there is no folder {0}, expected the folder of a run"),
        (lambda p: p, "error: {0} is not the folder of a run: it has no metrics.jsonl, and neither has one below it"),
    ],
)
def test_what_is_no_run_is_said_in_one_sentence(tmp_path, capsys, make, sentence):
    place = make(tmp_path)

    assert report([str(place)]) == 2
    assert capsys.readouterr().err == sentence.format(place) + "\n"


def test_a_page_that_cannot_be_written_fails_the_command_but_not_a_run(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").mkdir()

    assert report([str(folder)]) == 4
    assert capsys.readouterr().err.startswith("error: cannot write the report to")
    path, problem = try_report(folder)
    assert path is None and problem.startswith("no report was written (TrackingError: cannot write the report to")
    assert not list(folder.glob(".*tmp"))


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = write_run(tmp_path / "run")
    first = write_run_report(folder).read_bytes()

    assert write_run_report(folder).read_bytes() == first


def test_the_command_prints_the_path_and_imports_no_torch(tmp_path):
    folder = write_run(tmp_path / "run")
    code = (
        "import sys; from rlbench.commands.report import report; status = report(sys.argv[1:]); "
        "sys.exit(status or any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'wandb')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "rewards")))}

    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout) == (0, f"{folder / 'report.html'}\n"), done.stderr


def test_large_runs_show_rollouts_spread_over_the_run(tmp_path, read_page):
    folder = write_run(tmp_path / "run", 20)

    page = read_page(write_run_report(folder, max_rollouts=10))

    assert page.data["samples"]["step"][::2] == [1, 6, 11, 15, 20]
    assert "10 of 40 rollouts, evenly spread over the run." in page.text
