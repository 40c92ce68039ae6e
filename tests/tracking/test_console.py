"""What is printed: harmless text, plain logs, a live line that leaves nothing behind."""

import io
import re
import subprocess
import sys

import pytest

from rlbench.records import RewardComponent
from rlbench.tracking.console import PlanRow, RunConsole
from rlbench.tracking.run_summary import AccuracyChange

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")
STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def plain(now):
    return RunConsole(is_terminal=False, file=io.StringIO(), width=120, clock=lambda: now[0])


@pytest.fixture
def terminal(now, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    consoles = [
        RunConsole(is_terminal=True, file=io.StringIO(), width=width, clock=lambda: now[0]) for width in (120, 80)
    ]
    yield consoles
    for console in consoles:
        console.close()


def text_of(console):
    return console._console.file._file.getvalue()


def lines_of(console):
    return text_of(console).splitlines()


def everything(console, rollout, hostile):
    console.begin(20)
    console.plan([PlanRow("model", "model", hostile, hostile), PlanRow("sizes", "prompts per step", "8")])
    with console.phase("loading"):
        console.progress(hostile, 1, 4, hostile)
    for step in range(1, 21):
        console.step_line(step, 20, {"reward/mean": 0.1 * step, f"reward/{hostile}": 1.0, "time/step_s": 2.0})
    components = {hostile: RewardComponent(status="error", value=None, weight=1.0, message=hostile)}
    console.sample(rollout(text=hostile, prompt_id=hostile, components=components, reward=None), 3)
    console.evaluation(hostile, 21, 100, previous=(10, 100))
    console.note(hostile)
    console.warning(hostile)
    console.summary(
        history=[{"reward/mean": 0.1, f"reward/{hostile}": 1.0}] * 20,
        headline=hostile,
        files={hostile: hostile},
        next_commands=[hostile],
    )


def test_a_plain_log_has_no_control_character_whatever_the_text(plain, rollout, hostile):
    everything(plain, rollout, hostile)
    assert CONTROL.findall(text_of(plain)) == []
    assert "[red]\\x1b[2Jclear[/red] \\ud800 \\x00 \\u202e :smile:" in text_of(plain)


def test_a_terminal_gets_styles_and_line_erasing_only(terminal, rollout, hostile):
    for console in terminal:
        everything(console, rollout, hostile)
        rest = re.sub(r"\x1b\[(2K|\d+[AB])", "", STYLE.sub("", text_of(console))).replace("\r", "")
        assert CONTROL.findall(rest) == []
        assert "[red]" in rest and ":smile:" in rest


def test_hostile_text_printed_in_an_ascii_stream_does_not_crash(rollout, hostile):
    raw = io.BytesIO()
    console = RunConsole(is_terminal=False, file=io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    everything(console, rollout, hostile)
    assert b"\\u65e5\\u672c" in raw.getvalue()


def test_the_plan_shows_every_value_with_its_reason(plain):
    plain.plan(
        [
            PlanRow("model", "model", "SmolLM2", "the hub could not be reached"),
            PlanRow("sizes", "tokens per microbatch", "4096", "2 GiB free"),
            PlanRow("files", "output folder", "/x/" + "y" * 150),
        ]
    )
    lines = lines_of(plain)
    assert [line for line in lines if not line.startswith(" ")] == ["model", "sizes", "files"]
    assert any("SmolLM2  (the hub could not be reached)" in line for line in lines)
    assert any(line.endswith("/x/" + "y" * 150) for line in lines)  # not wrapped: a path to copy


def test_the_plan_fits_a_terminal(terminal):
    for console, width in zip(terminal, (120, 80), strict=True):
        console.plan([PlanRow("model", "model", "m" * 60, "because " * 20)])
        lines = STYLE.sub("", text_of(console)).splitlines()
        assert max(map(len, lines)) <= width
        assert "".join(lines).count("because") == 20


def test_plain_progress_comes_at_most_every_ten_seconds(plain, now):
    plain.begin(5)
    with plain.phase("generation"):
        for second in range(26):
            now[0] = float(second)
            plain.progress("generation", second, 26, "completions")
    progress = [line for line in lines_of(plain) if "completions" in line]
    assert [line.split()[1] for line in progress] == ["10/26", "20/26"]
    assert "step 1/5 | ETA after the first step" in progress[0]


def test_a_phase_is_announced_once_in_a_plain_log(plain):
    for _ in range(3):
        with plain.phase("training"):
            pass
    assert lines_of(plain) == ["training ..."]


def test_the_live_line_shows_the_runs_eta_and_leaves_nothing_behind(terminal, now):
    console = terminal[0]
    console.step_line(1, 10, {"time/step_s": 7.0})
    with pytest.raises(KeyError), console.phase("generation"):
        now[0] += 1
        console.progress("generation", 16, 64, "completions")
        assert "[#####...............] 16/64 completions | 1.0s | step 2/10 | ETA 1m02s, done at " in text_of(console)
        console.note("above")
        raise KeyError("stop")
    text = STYLE.sub("", text_of(console))
    assert "\x1b[2K\rabove\n" in text
    assert text.endswith("\x1b[2K\r")


def test_a_sample_shows_reward_by_component_and_what_was_left_out(plain, rollout):
    components = {
        "accuracy": RewardComponent(status="value", value=1.0, weight=1.0),
        "format": RewardComponent(status="value", value=0.5, weight=0.2),
        "judge": RewardComponent(status="timeout", value=None, weight=1.0, message="no verdict"),
    }
    long_text = "start " + "x" * 5000 + " end"
    plain.sample(rollout(text=long_text, components=components, reward=None, finish_reason="length"), 12, 0.71)
    text = text_of(plain)
    assert "step 12" in text and "train/7 #0" in text and "cut at the token limit" in text
    assert "none (left out) = accuracy 1.000 + format 0.500 x 0.2 + judge [timeout: no verdict]" in text
    assert "advantage +0.710" in text
    assert "| start " in text and "[... 3810 characters ...]" in text and text.count("x") < 2000
    plain.sample(rollout(text="a\n" * 1000), 12)
    assert "[... 977 lines ...]" in text_of(plain)


def test_an_evaluation_gives_its_interval_and_the_change(plain):
    plain.evaluation("gsm8k test, after training", 34, 100, previous=(21, 100))
    assert lines_of(plain) == [
        "evaluation, gsm8k test, after training: 34 of 100 right = 34.0% (95% interval 25.5% to 43.7%), "
        "+13.0 points (95% +0.6 to +24.9)"
    ]


def test_the_summary_says_what_was_learned_where_things_are_and_what_next(plain, now):
    with plain.phase("generation"):
        now[0] += 90
    command = "python -m rlbench report run=" + "o" * 150
    plain.summary(
        history=[{"reward/mean": step / 10} for step in range(8)],
        headline="Finished 8 of 8 steps.",
        accuracy=AccuracyChange(name="test", correct_before=21, num_before=100, correct_after=34, num_after=100),
        files={"adapter": "/runs/1/adapter"},
        next_commands=[command],
    )
    lines = lines_of(plain)
    order = [
        lines.index(title)
        for title in ("Finished 8 of 8 steps.", "What was learned", "Time by phase", "Files", "What to run next")
    ]
    assert order == sorted(order)
    assert f"  {command}" in lines and "  adapter  /runs/1/adapter" in lines
    assert ["generation", "1m30s", "100%"] in [line.split() for line in lines]
    assert any("0.050 ->   0.650" in line for line in lines) and any("more than chance" in line for line in lines)


def test_quiet_prints_one_line_at_the_start_warnings_and_the_summary_alone(rollout):
    console = RunConsole(is_terminal=False, quiet=True, file=io.StringIO())
    console.opening("grpo: 24 steps")
    assert text_of(console) == "grpo: 24 steps\n"
    console.plan([PlanRow("a", "b", "c")])
    with console.phase("x"):
        console.progress("x", 1, 2, "u")
    console.step_line(1, 2, {})
    console.sample(rollout(), 1)
    console.evaluation("e", 1, 2)
    console.note("n")
    assert lines_of(console) == ["grpo: 24 steps"]
    console.warning("w")
    console.summary(history=[], findings=["nothing"])
    lines = lines_of(console)
    assert (
        lines[1] == "warning: w" and "What was learned" in lines and lines[lines.index("Findings") + 1] == "  nothing"
    )


PIPED = """
from rlbench.tracking.console import RunConsole
console = RunConsole()
console.begin(2)
with console.phase("generation"):
    for done in range(3):
        console.progress("generation", done, 2, "completions")
for step in range(3000):
    console.step_line(step, 3000, {"reward/mean": 0.5})
console.close()
"""


def test_piped_output_is_plain_even_with_force_color(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = subprocess.run([sys.executable, "-c", PIPED], capture_output=True, timeout=60, check=True).stdout
    assert b"\x1b" not in output and b"\r" not in output.replace(b"\r\n", b"\n")


def test_a_reader_that_goes_away_does_not_stop_the_run():
    process = subprocess.Popen([sys.executable, "-c", PIPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0
