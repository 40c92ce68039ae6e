"""Every mistake gets one clear sentence, an exit status, no traceback, and soon."""

import json
import resource
from contextlib import contextmanager

import pytest

from tests.loops.conftest import run, run_afresh

ROW = json.dumps({"question": "1+1", "answer": "2"})


def check(done, message: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@contextmanager
def cpu_seconds():
    """One number: CPU time of the processes that ran inside. Other processes on the machine do not change it."""
    seconds = [0.0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield seconds
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds[0] = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


CONFIG_ERRORS = {
    "unknown key": (["optim.lrr=1"], "there is no key 'optim.lrr'; nearest valid keys: optim.lr"),
    "added key": (["+optim.foo=1"], "there is no key 'optim.foo'"),
    "unknown section": (["algoritm.kl_coef=1"], "algorithm.kl_coef"),
    "text for a number": (["optim.lr=fast"], "optim.lr is 'fast', expected a number"),
    "fraction for a count": (["training.num_steps=2.5"], "training.num_steps is '2.5', expected a whole number"),
    "text for a switch": (["tracking.quiet=maybe"], "tracking.quiet is 'maybe', expected true or false"),
    "null for a number": (["optim.eps=null"], "optim.eps is null, expected a number"),
    "experiment without +": (["exp=grpo_gsm8k"], "an experiment is added to the base config: write +exp=grpo_gsm8k"),
    "sweep without -m": (["optim.lr=1e-4,3e-4"], "optim.lr has several values (1e-4,3e-4); add -m to sweep over them"),
    "dashes": (["--seed=3"], "--seed=3 is no option: settings are written without dashes, seed=3"),
    "no value": (["optim.lr"], "cannot read the override 'optim.lr': expected key=value"),
    "unquoted text": (["data.system_prompt=be (brief"], """'data.system_prompt="be (brief"'"""),
    "unknown model": (["model=smol"], "or model.path=HUB_ID, FOLDER or FILE.gguf"),
    "resumed folder": (["resume=nowhere"], "resume is nowhere, but there is no such folder; expected a run's folder"),
    "out of range": (["optim.lr=-1"], "optim.lr is -1.0, expected more than 0"),
    "endless": (["optim.lr=inf"], "optim.lr is inf, expected less than inf"),
    "more threads than OpenMP survives": (["hardware.num_threads=100000"], "num_threads is 100000, expected at most"),
    "wrong choice": (["optim.schedule=cosin"], "did you mean cosine?"),
    "wrong group choice": (["optim=adam"], "optim=adam: there is no such choice, expected one of: adamw"),
    "wrong experiment": (["+exp=grpo_gsm"], "did you mean grpo_gsm8k?"),
    "wrong command": (["trian"], "there is no command 'trian', expected one of: train"),
    "empty stop string": (["sampling.stop=['']"], "sampling.stop is [''], expected texts of at least one character"),
    "two guides": (["sampling.guided_regex=a", "sampling.guided_choice=[a]"], "are both set, expected one of them"),
    "guide and temperature": (
        ["sampling.guided_regex=a", "sampling.temperature=0.5"],
        "sampling.temperature is 0.5, but guided decoding needs 1",
    ),
    "penalty": (["sampling.presence_penalty=3"], "sampling.presence_penalty is 3.0, expected at most 2"),
    "evaluations of nothing": (
        ["evaluation.num_prompts=0", "evaluation.every_steps=5"],
        "evaluation.every_steps is 5, but evaluation.num_prompts is 0, so nothing is evaluated; expected 0",
    ),
    "samples of nothing": (
        ["evaluation.num_prompts=0", "evaluation.num_samples=4"],
        "evaluation.num_samples is 4",
    ),
    "a setting of a reward that is not set yet": (
        ["rewards.components.accuracy.gate_min=0.5"],
        "rewards.components.accuracy.gate_min is not set, so it cannot be changed; to add it, write +rewards.",
    ),
    "a reward's unknown setting": (
        ["rewards.components.accuracy.gate=0.5"],
        "there is no key 'rewards.components.accuracy.gate'; nearest valid keys: gate_min",
    ),
    "output folder": (["hydra.run.dir=/proc/no"], "hydra.run.dir=/proc/no must be writable"),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_config_errors_name_the_key_without_importing_torch(tmp_path, name):
    overrides, message = CONFIG_ERRORS[name]

    with cpu_seconds() as seconds:
        done = run_afresh(*overrides, folder=tmp_path)

    check(done, message)
    assert seconds[0] < 2  # 0.3 to 0.5 s; importing torch costs more than 2


def test_help_lists_commands_experiments_and_groups_at_once(tmp_path):
    with cpu_seconds() as seconds:
        done = run_afresh("--help", folder=tmp_path)

    assert done.returncode == 0
    for expected in ("+exp=grpo_gsm8k", "train", "optim", "resume="):
        assert expected in done.stdout
    assert seconds[0] < 2


def test_cfg_job_prints_the_composed_config_and_runs_nothing(tmp_path):
    done = run("+exp=grpo_gsm8k", "--cfg", "job", folder=tmp_path)

    assert done.returncode == 0
    assert "prompt_column: question" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_missing_data_file(tmp_path):
    with cpu_seconds() as seconds:
        done = run_afresh("+exp=grpo_gsm8k", "data.path=nothing.jsonl", folder=tmp_path)

    check(done, "data.path is nothing.jsonl, but there is no such file")
    assert seconds[0] < 2
    assert not list(tmp_path.glob("outputs/*/*"))


def test_a_model_that_is_nowhere(tmp_path):
    done = run("+exp=grpo_gsm8k", "model=no/such-model", folder=tmp_path)

    check(done, "model.path is no/such-model, but there is no such folder or GGUF file and the hub cannot be reached")
    assert "model=no/such-model is read as model.path=no/such-model" in done.stdout


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{ROW}\n{{broken\n{ROW}\n")

    check(run("+exp=grpo_gsm8k", "data.path=rows.jsonl", folder=tmp_path), "line 2: not JSON")


def test_a_prompt_longer_than_the_context(tmp_path, tiny_overrides):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1" * 300, "answer": "2"}) + "\n")

    done = run(*tiny_overrides, "data.path=rows.jsonl", folder=tmp_path)

    check(
        done, "row 1 of the train data makes a prompt of 318 tokens, expected at most 244 (the model's context of 256"
    )


def test_a_step_to_profile_that_is_never_made(tmp_path, tiny_overrides):
    done = run(*tiny_overrides, "training.num_steps=2", "tracking.profile_step=3", folder=tmp_path)

    check(done, "tracking.profile_step is 3, expected at most training.num_steps (2)")


def test_the_plan_says_which_held_out_prompts_are_trained_on_or_left_out(tmp_path, tiny_overrides):
    rows = [json.dumps({"question": question, "answer": "2"}) for question in ("1+1", "0+2", "1" * 300, "3-1")]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:2]))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[1:]))

    done = run(*tiny_overrides, "training.num_steps=1", "data.path=train.jsonl", "data.eval_path=test.jsonl",
               "data.long_prompts=skip", folder=tmp_path)  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    row = " ".join(next(line for line in done.stdout.splitlines() if "held-out prompts" in line).split())
    assert row.startswith("held-out prompts 2 (1 of them are training prompts too") and "1 more are too long" in row


def test_completions_longer_than_the_context(tmp_path, tiny_overrides):
    done = run(*tiny_overrides, "sampling.max_tokens=256", folder=tmp_path)

    check(done, "sampling.max_tokens is 256, but the model's context is 256 tokens, prompt included")


def test_a_microbatch_that_some_rollout_would_not_fit(tmp_path, tiny_overrides):
    sizes = ["training.num_steps=1", "evaluation.num_prompts=0", "sampling.max_tokens=12"]

    refused = run(*tiny_overrides, *sizes, "training.tokens_per_microbatch=31", folder=tmp_path)
    taken = run(*tiny_overrides, *sizes, "training.tokens_per_microbatch=32", folder=tmp_path)

    check(refused, "training.tokens_per_microbatch is 31, but the longest prompt (21 tokens) with a completion of ")
    assert "expected at least training.tokens_per_microbatch=32" in refused.stderr
    assert "evaluation" not in refused.stdout and taken.returncode == 0, refused.stdout + taken.stderr


def test_a_reward_that_does_not_exist(tmp_path, tiny_overrides):
    done = run(*tiny_overrides, "+rewards.components.x={path:rlbench_rewards.math_answer.MathAnswr}", folder=tmp_path)

    check(done, "rlbench_rewards.math_answer has no MathAnswr; nearest names: MathAnswer")


def test_a_guide_that_the_engine_cannot_follow(tmp_path, tiny_overrides):
    done = run(*tiny_overrides, "sampling.guided_choice=[yes,no]", folder=tmp_path)

    check(done, "sampling.guided_choice is set, which engine=hf cannot follow; expected engine=vllm")


def test_deterministic_kernels_on_a_cpu(tmp_path, tiny_overrides):
    done = run(*tiny_overrides, "engine.deterministic=true", folder=tmp_path)

    check(
        done, "engine.deterministic is true, which needs engine=vllm on a GPU (VLLM_BATCH_INVARIANT); found engine=hf"
    )


def test_a_stop_token_that_the_model_does_not_have(tmp_path, tiny_overrides):
    done = run(*tiny_overrides, "sampling.stop_token_ids=[5,98]", folder=tmp_path)

    check(done, "sampling.stop_token_ids names 98, but")


def test_a_gpu_that_is_not_there(tmp_path, tiny_overrides):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    check(
        run(*tiny_overrides, "hardware=gpu", folder=tmp_path), "hardware.profile is gpu, but torch sees no CUDA device"
    )
