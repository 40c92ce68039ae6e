"""log.txt holds what a run printed, from before its folder was known on."""

import io
from pathlib import Path

from rlbench.tracking.console import PlanRow, RunConsole
from rlbench.tracking.run_log import RunLog


def test_all_that_is_printed_is_in_the_log_and_the_second_start_is_appended(tmp_path, capsys):
    path = tmp_path / "log.txt"
    for name in ("first", "second"):
        console = RunConsole(is_terminal=name == "second", file=io.StringIO(), width=80)
        console.plan([PlanRow("Sizes", "training.num_steps", "7", "derived: so")])
        console.log.open(path, f"--- {name}")
        console.note("a note of [bold]brackets[/bold] " + "that is long " * 20)
        console.error("error: step 3: it broke")
        console.log.close()
        console.note("after the end")

    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("---")] == ["--- first", "--- second"]
    assert sum("training.num_steps" in line and "derived: so" in line for line in lines) == 2
    assert sum(line.startswith("a note of [bold]brackets[/bold] that") and len(line) > 250 for line in lines) == 2
    assert lines.count("error: step 3: it broke") == 2 and "after the end" not in lines
    assert "\x1b" not in path.read_text()
    assert capsys.readouterr().err.count("error: step 3: it broke") == 2


def test_a_full_disk_does_not_stop_a_run():
    log = RunLog()
    log.open(Path("/dev/full"), "--- a start")

    log.print("a line")
    log.close()
