"""The live view on a terminal: what it says, and that it leaves nothing behind."""

import io
import re
import time

import pytest

from rlbench.tracking.console import RunConsole, _eta_text
from rlbench.tracking.live_view import MAX_POINTS, LiveView


def metrics(step: int) -> dict[str, float | None]:
    return {
        "reward/mean": 0.1 * step,
        "policy/entropy": 2.0 - 0.1 * step,
        "completion/length_tokens_mean": 60.0,
        "optim/grad_norm": None if step == 2 else 1.0,
        "time/generation_s": 6.0,
        "time/update_s": 3.0,
        "time/rewards_s": 0.1,
        "time/step_s": 10.0,
    }


def filled(**options) -> LiveView:
    view = LiveView(**options)
    for step in range(1, 9):
        view.add(metrics(step))
    return view


def shown(view: LiveView, width: int) -> list[str]:
    return [line.plain for line in view.lines(width)]


def test_a_curve_shows_its_last_value_and_its_range():
    line = next(line for line in shown(filled(), 80) if line.startswith("reward"))

    assert line.split()[1:] == ["▁▂▃▄▅▆▇█", "0.800", "0.100", "to", "0.800"]


def test_a_step_without_the_number_leaves_a_gap():
    line = next(line for line in shown(filled(), 80) if line.startswith("grad"))

    assert line.removeprefix("grad    ").startswith("▅ ▅▅▅▅▅▅ ")


def test_a_long_run_is_remembered_in_few_points_with_its_last_value_and_its_range():
    view, short = LiveView(), LiveView()
    for step in range(10_007):
        view.add({"reward/mean": 5.0 if step == 4_321 else step / 10_007, "optim/grad_norm": None})
    for step in range(40):
        short.add({"reward/mean": step / 40})
    curve = view._curves["reward/mean"]
    (line,) = (line for line in shown(view, 120) if line.startswith("reward"))
    (rising,) = (line for line in shown(short, 120) if line.startswith("reward"))

    assert line.split()[2:] == ["1.000", "0.000", "to", "5.00"]
    assert MAX_POINTS // 2 <= len(curve.points) < MAX_POINTS
    assert curve.points[0] == pytest.approx(15.5 / 10_007)  # mean of the first 32
    spike = curve.points.pop(4_321 // 32)
    assert spike is not None and spike > curve.points[-1] / 2
    assert all(a < b for a, b in zip(curve.points, curve.points[1:], strict=False) if a and b)
    assert len(line.split()[1]) == len(rising.split()[1])


def test_the_bar_shares_the_time_of_the_steps_out():
    bar, legend = shown(filled(), 88)[-2:]

    assert bar.count("━") == 80 and legend.split("━")[1:] == [" generation 60%  ", " update 30%  ", " other 10%  "]


def test_only_what_has_two_values_is_drawn():
    view = LiveView()
    view.add(metrics(1))
    assert view.lines(80) == []
    view.add(metrics(2))
    assert "grad" not in "".join(shown(view, 80))
    assert "accuracy" not in "".join(shown(view, 80))
    for share in (0.25, 0.5):
        view.add({"eval/accuracy": share})
    assert "50%  25% to 50%" in "".join(shown(view, 80))


@pytest.mark.parametrize("width", [30, 45, 80, 109, 110, 200])
def test_no_line_is_longer_than_the_terminal(width):
    assert all(len(line) <= width for line in shown(filled(), width))


def test_a_terminal_without_block_characters_gets_ascii():
    assert "".join(shown(filled(is_ascii=True), 80)).isascii()


def screen(text: str, height: int) -> list[str]:
    """What a terminal of `height` lines shows after `text`: printing, CR, LF, lines erased, cursor up and down."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[\d;]*m|[\r\n]|[^\x1b\r\n]+", text):
        if part.endswith("m") and part[0] == "\x1b":
            continue
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
        elif part.startswith("\x1b"):
            number, kind = int(part[2:-1] or 1), part[-1]
            bottom = len(lines) - 1
            row = max(0, bottom - height + 1, row - number) if kind == "A" else row
            row = min(bottom, row + number) if kind == "B" else row
            assert kind in "ABK"
            if kind == "K":
                lines[row] = ""
        while len(lines) <= row:
            lines.append("")
        if part[0] not in "\r\n\x1b":
            old = lines[row].ljust(column)
            lines[row] = old[:column] + part + old[column + len(part) :]
            column += len(part)
    return lines


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LINES", "30")
    console = RunConsole(is_terminal=True, file=io.StringIO(), width=100, clock=lambda: 0.0)
    yield console
    console.close()


def text_of(console: RunConsole) -> str:
    return console._console.file._file.getvalue()


def run_steps(console: RunConsole) -> None:
    console.begin(10)
    for step in range(1, 9):
        with console.phase("generation"):
            console.progress("generation", 1, 2, "completions")
            console.note(f"note {step}")
        console.step_line(step, 10, metrics(step))


def test_the_view_stands_below_what_was_printed(terminal):
    run_steps(terminal)
    with terminal.phase("generation"):
        terminal.progress("generation", 1, 2, "completions")
        lines = [line.rstrip() for line in screen(text_of(terminal), 30)]

    notes = [line for line in lines if line.startswith("note")]
    assert notes == [f"note {step}" for step in range(1, 9)]
    assert [line.split()[0] for line in lines[-7:]] == [
        "reward",
        "entropy",
        "length",
        "grad",
        "time",
        "━",
        "generation",
    ]
    assert "step 9/10" in lines[-1] and ", done at " in lines[-1]


def test_the_view_leaves_nothing_behind(terminal):
    run_steps(terminal)
    terminal.close()
    lines = [line for line in screen(text_of(terminal), 30) if line.strip()]

    assert not any(mark in line for line in lines for mark in "▁━") and lines[-1].lstrip().startswith("8/10")


def test_a_low_terminal_keeps_the_status_line_alone(terminal):
    terminal._console.height = 6
    run_steps(terminal)

    assert "━" not in text_of(terminal)


def test_nothing_of_it_is_in_a_log_file():
    console = RunConsole(is_terminal=False, file=io.StringIO(), width=120)
    run_steps(console)

    assert not any(mark in text_of(console) for mark in "▁━\x1b")


def test_the_end_is_given_with_the_date_where_it_is_another_day():
    noon = time.mktime((2026, 11, 24, 12, 0, 0, 0, 0, -1))

    assert _eta_text(62, noon) == "ETA 1m02s, done at 12:01"
    assert _eta_text(86400, noon).endswith("done at 2026-11-25 12:00")
    assert _eta_text(None, noon) == "ETA after the first step"
