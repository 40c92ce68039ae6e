"""Whole GRPO runs: reward rises, files are complete, a stopped run continues bit for bit, the adapter is PEFT's."""

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbench.tracking.jsonl import read_metrics
from rlbench.tracking.rollout_store import read_rollouts
from rlbench.training.checkpoint import find_checkpoint, read_checkpoint
from tests.loops.conftest import run, run_afresh, start
from tests.loops.forked import ForkedProcess


@pytest.fixture(scope="module")
def finished(tiny_overrides, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    folder = tmp_path_factory.mktemp("finished")
    done = run_afresh(*tiny_overrides, "training.num_steps=24", "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder / "run"


def test_the_reward_rises(finished):
    rewards = [line["reward/mean"] for line in read_metrics(finished[1] / "metrics.jsonl", "train")]

    assert len(rewards) == 24
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.2


def test_the_user_reads_plan_steps_evaluation_and_summary(finished):
    text = finished[0].stdout

    for expected in ("model.path", "derived: ", "training.recompute  ", "24/24",
                     "evaluation, held-out problems before training", "What was learned",
                     "What to run next", "Time by phase"):  # fmt: skip
        assert expected in text
    assert "Traceback" not in text + finished[0].stderr


def test_the_run_folder_is_complete(finished):
    run_folder = finished[1]
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    rollouts = read_rollouts(run_folder / "rollouts" / "step-000001.parquet")

    assert config["optim"]["lr"] == 0.02 and config["engine"]["kind"] == "hf"
    assert "engine.kind" in json.loads((run_folder / "derived.json").read_text())
    assert json.loads((run_folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert len(rollouts) == 32
    assert {r["policy_version"] for r in rollouts} == {0}
    assert {r["adapter_fingerprint"] for r in rollouts} != {"base"}
    assert find_checkpoint(run_folder)[0].step == 24
    assert "Content-Security-Policy" in (run_folder / "report.html").read_text()
    assert f"report      {run_folder / 'report.html'}" in finished[0].stdout


def test_a_run_whose_report_cannot_be_written_ends_well_and_says_so(tiny_overrides, tmp_path):
    (tmp_path / "run" / "report.html").mkdir(parents=True)

    done = run(*tiny_overrides, "training.num_steps=1", "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: no report was written (TrackingError: cannot write the report to" in done.stdout + done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_engine_and_trainer_agree_on_every_sampled_token(finished):
    gaps = [line.get("drift/logprob_gap_max", 0.0) for line in read_metrics(finished[1] / "metrics.jsonl", "train")]

    assert 0 < max(gaps) < 1e-3  # float32


def test_peft_loads_the_adapter_and_reproduces_the_greedy_evaluation(finished, tiny_folder):
    run_folder = finished[1]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run_folder / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    rows = read_rollouts(run_folder / "rollouts" / "eval-step-000024.parquet")

    for row in rows:
        prompt = torch.tensor([row["prompt_token_ids"]])
        output = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0)
        assert output[0, prompt.shape[1] :].tolist() == list(row["token_ids"]), tokenizer.decode(output[0])
    assert len(rows) == 8


def test_an_fp8_base_trains_on_our_engine(tiny_overrides, tmp_path):
    done = run(
        *tiny_overrides, "model.quantization=fp8", "training.num_steps=16", "hydra.run.dir=run", folder=tmp_path
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    rewards = [line["reward/mean"] for line in lines]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
    assert 0 < max(line.get("drift/logprob_gap_max", 0.0) for line in lines) < 1e-3  # float32, one base
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["quantization"] == "fp8"


def comparable(run_folder: Path) -> list[dict]:
    """Metrics without what depends on the clock, and without the proof that every process begins with."""
    lines = read_metrics(run_folder / "metrics.jsonl")
    return [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("time/", "tokens/", "identity/")) and not k.endswith(("_s", "_gib"))
        }
        for line in lines
    ]


def sampled(run_folder: Path) -> dict[str, list]:
    return {
        file.name: [(r["rollout_id"], list(r["token_ids"]), r["reward"], r["advantage"]) for r in read_rollouts(file)]
        for file in sorted((run_folder / "rollouts").glob("*.parquet"))
    }


def test_the_command_that_is_printed_goes_on_with_the_same_settings(tiny_overrides, tmp_path):
    first = run(*tiny_overrides, "seed=2", "training.num_steps=1", "evaluation.num_prompts=0", "hydra.run.dir=run",
                folder=tmp_path)  # fmt: skip
    command = next(line for line in first.stdout.splitlines() if line.rstrip().endswith("# train on"))
    python, dash_m, program, *arguments = shlex.split(command, comments=True)

    resumed = run(*arguments, folder=tmp_path)

    assert [python, dash_m, program] == ["python", "-m", "rlbench"]
    assert resumed.returncode == 0, command + resumed.stdout + resumed.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")] == [1, 2]
    # the schedule of twice as many steps is the one change
    assert resumed.stdout.count("in the run that is resumed") == 1
    assert "training.num_steps was 1 in the run that is resumed and is 2 now" in " ".join(resumed.stdout.split())

    before = (tmp_path / "run" / "config.yaml").read_text()
    fewer = run(*arguments, "training.num_steps=1", folder=tmp_path)

    assert fewer.returncode == 2 and "training.num_steps is 1, but 2 steps are done in " in fewer.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize("ending", ["# talk with it", "# one folder for transformers and vLLM"])
def test_the_commands_for_what_was_trained_are_printed_and_work(finished, ending):
    command = next(line for line in finished[0].stdout.splitlines() if line.rstrip().endswith(ending))
    python, dash_m, program, *arguments = shlex.split(command, comments=True)

    done = run(*arguments, folder=finished[1].parent)

    assert [python, dash_m, program] == ["python", "-m", "rlbench"] and str(finished[1]) in arguments
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_continues_bit_for_bit(finished, tiny_overrides, tmp_path, how):
    arguments = [*tiny_overrides, "training.num_steps=24", "checkpoint.every_steps=2"]
    process = start(*arguments, "hydra.run.dir=run", folder=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 6, process)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how, output
        assert "finishing this step, then saving" in output and "# go on" in output
    stopped_at = find_checkpoint(tmp_path / "run")[0].step
    assert 2 <= stopped_at < 24

    resumed = run(*arguments, "resume=run", folder=tmp_path)

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{stopped_at} steps are done" in resumed.stdout
    undisturbed = finished[1]
    assert comparable(tmp_path / "run") == comparable(undisturbed)
    assert sampled(tmp_path / "run") == sampled(undisturbed)
    adapters = [read_checkpoint(f / "checkpoints" / "step-000024") for f in (tmp_path / "run", undisturbed)]
    assert adapters[0].state["adapter_fingerprint"] == adapters[1].state["adapter_fingerprint"]
    assert adapters[0].state["config"] == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert adapters[0].state["environment"]["packages"]["torch"] == torch.__version__
    assert not (tmp_path / "outputs").exists()


def test_resume_auto_takes_the_newest_valid_checkpoint_or_begins(tiny_overrides, tmp_path):
    arguments = [*tiny_overrides, "checkpoint.every_steps=1", "resume=auto"]
    first = run(*arguments, "training.num_steps=2", "hydra.run.dir=runs/a", folder=tmp_path)
    assert "has a checkpoint; a new run begins" in first.stdout
    run(*arguments[:-1], "training.num_steps=3", "hydra.run.dir=runs/b", folder=tmp_path)
    (tmp_path / "runs" / "b" / "checkpoints" / "step-000003" / "state.json").write_text("{}")

    again = run(*arguments, "training.num_steps=4", "hydra.run.dir=runs/c", folder=tmp_path)

    assert again.returncode == 0, again.stdout + again.stderr
    text = " ".join((again.stdout + again.stderr).split())
    assert "step-000003 is damaged: state.json" in text and "an older checkpoint is taken" in text
    assert f"resume=auto: going on with {tmp_path}/runs/b, 2 steps are done" in text.replace("/ ", "/")
    assert find_checkpoint(tmp_path / "runs" / "b")[0].step == 4
    assert not (tmp_path / "runs" / "c").exists()


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(tiny_overrides, tmp_path):
    process = start(*tiny_overrides, folder=tmp_path)
    read_until("reading data and model", process)

    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]

    assert process.returncode == 130, output
    assert "stopped before the first step; nothing was saved" in output and "Traceback" not in output
    assert not (tmp_path / "outputs").exists()


def test_a_second_ctrl_c_ends_the_run_within_the_step(tiny_overrides, tmp_path):
    slow = "+rewards.components.slow={path:tests.loops.letter_reward.takes_a_minute}"
    process = start(
        *tiny_overrides, slow, "rewards.timeout_s=100", "evaluation.num_prompts=0", "hydra.run.dir=run", folder=tmp_path
    )
    read_until("rewards ...", process)

    process.send_signal(signal.SIGINT)
    read_until("SIGINT: finishing this step, then saving", process)
    start_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]

    assert process.returncode == 130, output
    assert "stopped in step 1 without saving; no checkpoint was written yet" in output and "Traceback" not in output
    assert time.monotonic() - start_s < 30  # the reward sleeps on for longer: its worker was killed


def test_ctrl_c_ends_a_sweep_not_only_its_present_run(tiny_overrides, tmp_path):
    arguments = [*tiny_overrides, "training.num_steps=500", "seed=1,2", "hydra.sweep.dir=sweep"]
    process = start(*arguments[:2], "-m", *arguments[2:], folder=tmp_path)
    wait_for(lambda: (tmp_path / "sweep" / "0" / "metrics.jsonl").exists(), process)

    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]

    assert process.returncode == 130, output
    assert not (tmp_path / "sweep" / "1").exists() and "Traceback" not in output


def read_until(text: str, process: ForkedProcess) -> None:
    lines = [""]
    while text not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)


def wait_for(condition, process: ForkedProcess, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_resume_with_another_adapter_rank_is_refused(finished, tiny_overrides, tmp_path):
    done = run(*tiny_overrides, "training.num_steps=24", "lora.rank=4", f"resume={finished[1]}", folder=tmp_path)

    assert done.returncode == 2
    assert "lora.rank was 16 in the run that is resumed and is 4 now" in done.stderr


def test_the_checkpoint_of_the_best_evaluation_is_kept(tiny_overrides, tmp_path):
    folder = tmp_path / "best"
    done = run(
        *tiny_overrides, "training.num_steps=6", "evaluation.every_steps=1", "checkpoint.every_steps=0", "optim.lr=0.2",
        "checkpoint.keep_last=1", "checkpoint.keep_best=eval/share", f"hydra.run.dir={folder}", folder=tmp_path,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr + done.stdout
    shares = {line["step"]: line["eval/share"] for line in read_metrics(folder / "metrics.jsonl", "eval")}
    best = max(shares, key=lambda step: (shares[step], -step))
    assert 0 < best < 5, shares  # at this learning rate the reward falls again
    expected = {f"step-{step:06d}" for step in (best, 6)}
    assert {checkpoint.name for checkpoint in (folder / "checkpoints").iterdir()} == expected


def test_held_out_problems_are_sampled_too(tiny_overrides, tmp_path):
    done = run(
        *tiny_overrides, "training.num_steps=1", "evaluation.num_samples=4", "hydra.run.dir=run", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "eval/accuracy" in row):
        one, any_of_4 = row["eval/sampled_accuracy"], row["eval/pass_at_4"]
        assert one <= any_of_4 <= min(1.0, 4 * one)
        assert row["eval/sampled_accuracy_low"] <= one <= row["eval/sampled_accuracy_high"]
    assert sum("eval/pass_at_4" in row for row in rows) == 2
    (last,) = (row for row in rows if "eval/sampled_change" in row)
    assert last["step"] == 1 and last["eval/sampled_change_low"] <= last["eval/sampled_change"]
    assert done.stdout.count("on the same problems)") == 2  # after the evaluation and in the summary


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["checkpoint.keep_best=eval/share"], "evaluation.every_steps is 0"),
        (["checkpoint.keep_best=eval/nothing", "evaluation.every_steps=1"], "but the evaluations have eval/accuracy"),
    ],
)
def test_a_best_that_cannot_be_found_is_one_sentence(tiny_overrides, tmp_path, overrides, sentence):
    done = run(*tiny_overrides, "training.num_steps=2", *overrides, folder=tmp_path)

    assert done.returncode == 2 and sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
