"""The command eval: a finished run's policy answers as it did in the run, alone and beside other policies."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from rlbench.commands.eval import eval_run, parse
from rlbench.config.compose import CONFIG_ERRORS, explain_config_error
from rlbench.tracking.jsonl import read_metrics
from rlbench.tracking.rollout_store import read_groups
from rlbench.training.checkpoint import read_checkpoint
from tests.loops.conftest import run, run_afresh
from tests.loops.test_user_errors import check
from tests.tiny import save_tiny_model

STEPS = ["training.num_steps=6", "checkpoint.every_steps=2", "checkpoint.keep_last=3", "evaluation.every_steps=2"]
MEASURED = [*STEPS, "evaluation.num_samples=4", "checkpoint.keep_best=eval/accuracy", "tracking.sample_every_steps=0"]


@pytest.fixture(scope="module")
def trained(tiny_overrides, tmp_path_factory) -> Path:
    """A run that was evaluated before its first step and after every second one."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(*tiny_overrides, *MEASURED, "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def evaluated(run_folder: Path, *options: str, folder: Path | None = None, start=run) -> tuple[dict, str]:
    """The numbers that `eval` wrote, beside which the answers lie, and what it printed."""
    out = f"{len(list(run_folder.parent.glob('*.json')))}.json"
    done = start("eval", run_folder.name, "--out", out, *options, folder=folder or run_folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((run_folder.parent / out).read_text())
    return found | {"folder": run_folder.parent / out.removesuffix(".json")}, done.stdout


def own_metrics(run_folder: Path, step: int) -> dict:
    (found,) = [row for row in read_metrics(run_folder / "metrics.jsonl", "eval") if row["step"] == step]
    return {key: value for key, value in found.items() if key.startswith("eval/") and "change" not in key}


def answers(file: Path) -> list[tuple]:
    return [
        (r.rollout_id, r.completion.token_ids, r.completion.sampling_logprobs, r.reward)
        for group in read_groups(file)
        for r in group.rollouts
    ]


def test_the_last_policy_answers_as_it_did_in_its_run(trained):
    found, printed = evaluated(trained, start=run_afresh)
    policy, own = found["policy"], own_metrics(trained, 6)

    assert {key: policy["metrics"][key] for key in own} == own
    assert "eval/pass_at_4" in own and own["eval/accuracy"] > 0.5
    assert answers(found["folder"] / "policy.parquet") == answers(trained / "rollouts" / "eval-step-000006.parquet")
    correct = policy["num_correct"]
    assert f"greedy     {correct} of 8 right = {100 * correct / 8:.1f}% (95% interval " in printed
    assert "sampled    4 to each problem: " in printed and "none broke on 40 answers" in printed
    assert f"fingerprint {policy['fingerprint']}, step 6, 6 updates" in printed
    assert "rows.jsonl: 40 rows; 8 held-out prompts, those that the run held out" in printed


@pytest.mark.parametrize("step", [2, 4])
def test_any_step_that_was_kept_can_be_evaluated(trained, step):
    found, _ = evaluated(trained, "--step", str(step))
    own = own_metrics(trained, step)
    state = read_checkpoint(trained / "checkpoints" / f"step-{step:06d}").state

    assert found["policy"]["fingerprint"] == state["adapter_fingerprint"]
    assert found["policy"]["step"] == step and found["policy"]["policy_version"] == state["policy_version"]
    assert {key: found["policy"]["metrics"][key] for key in own} == own
    rollouts = [r for g in read_groups(found["folder"] / "policy-sampled.parquet") for r in g.rollouts]
    assert len(rollouts) == 32
    assert {r.completion.adapter_fingerprint for r in rollouts} == {state["adapter_fingerprint"]}
    assert {r.completion.policy_version for r in rollouts} == {state["policy_version"]}


def test_the_best_step_is_that_of_the_best_evaluation(trained):
    found, _ = evaluated(trained, "--step", "best", "evaluation.num_samples=0")
    accuracy = {row["step"]: row["eval/accuracy"] for row in read_metrics(trained / "metrics.jsonl", "eval")}

    assert found["policy"]["step"] == max(accuracy, key=accuracy.__getitem__) > 0
    assert not (found["folder"] / "policy-sampled.parquet").exists()


def test_the_base_is_what_the_run_started_with(trained):
    found, printed = evaluated(trained, "--against", "base")
    own, started = own_metrics(trained, 0), found["against"]

    assert {key: started["metrics"][key] for key in own} == own
    greedy = answers(found["folder"] / "against.parquet")
    assert greedy == answers(trained / "rollouts" / "eval-step-000000.parquet")
    accuracy, sampled = found["paired"]
    assert (accuracy["before"], accuracy["after"]) == tuple(
        found[s]["metrics"]["eval/accuracy"] for s in ("against", "policy")
    )
    assert (
        accuracy["num"] == 8 and accuracy["num_gained"] == found["policy"]["num_correct"] and not accuracy["num_lost"]
    )
    assert sampled["difference"] == pytest.approx(
        found["policy"]["metrics"]["eval/sampled_accuracy"] - started["metrics"]["eval/sampled_accuracy"]
    )
    assert f"{accuracy['num_gained']} gained, 0 lost of 8, p = " in printed
    assert started["fingerprint"] != found["policy"]["fingerprint"]


def test_two_steps_of_a_run_are_compared(trained):
    found, printed = evaluated(trained, "--against", "run@2", "evaluation.num_samples=0")

    assert (found["policy"]["step"], found["against"]["step"]) == (6, 2)
    own = own_metrics(trained, 2)
    assert found["against"]["metrics"]["eval/reward"] == own["eval/reward"]
    assert "step 6 of run less step 2 of run, prompt by prompt" in printed


def patched(code: str) -> str:
    """A program that is `python -m rlbench` with something broken in it."""
    imports = ["from rlbench.engine.hf_engine import HfEngine", "from rlbench.models.policy import Policy"]
    return "\n".join([*imports, code, "from rlbench.__main__ import main", "main()"])


BROKEN = {
    "weights never arrive": (
        "def sync(self, weights, version):\n"
        "    self.policy_version, self.adapter_fingerprint = version, weights.fingerprint()\n"
        "HfEngine.sync = sync",
        6,
        "step 6 of run: policy version 6: the adapter in the engine is not the trainer's: the engine holds no adapter",
    ),
    "answers name other weights": (
        "sync = HfEngine.sync\n"
        "def other(self, weights, version):\n"
        "    sync(self, weights, version)\n"
        "    self.adapter_fingerprint = '0' * 16\n"
        "HfEngine.sync = other",
        6,
        "was sampled with adapter 0000000000000000, but the trainer holds",
    ),
    "the engine computes otherwise": (
        "score = HfEngine.score\n"
        "HfEngine.score = lambda self, *a, **k: [[v - 0.5 for v in row] for row in score(self, *a, **k)]",
        6,
        "engine and trainer disagree on",
    ),
    "the checkpoint is not loaded": (
        "Policy.load = lambda self, folder: None",
        2,
        "checkpoints/step-000006 names weights with fingerprint",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_number_is_given_for_weights_that_did_not_answer(trained, tmp_path, name):
    code, status, sentence = BROKEN[name]
    shutil.copytree(trained, tmp_path / "run")

    done = run("eval", "run", "evaluation.num_samples=0", folder=tmp_path, program=patched(code))

    assert done.returncode == status, done.stdout + done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr and " right = " not in done.stdout
    assert not (tmp_path / "run" / "evaluations").exists()


def test_a_damaged_checkpoint_is_refused_and_an_older_one_is_said(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-000006" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")

    named = run("eval", "run", "--step", "6", folder=tmp_path)
    last = run("eval", "run", "evaluation.num_samples=0", folder=tmp_path)

    check(named, "checkpoints/step-000006 is damaged: adapter/adapter_model.safetensors")
    assert last.returncode == 0, last.stdout + last.stderr
    assert "warning: " in last.stdout and "an older checkpoint is taken" in last.stdout
    assert "step 4 of run" in last.stdout


def test_a_verifier_that_breaks_is_not_a_wrong_answer(trained):
    broken = "rewards.components.accuracy={path: tests.loops.faulty_rewards.raises_on_some}"
    prefixes = "rewards.allowed_prefixes=[tests.loops.]"
    found, printed = evaluated(trained, broken, prefixes, "evaluation.num_samples=0")
    policy = found["policy"]

    components = [r.components["accuracy"] for g in read_groups(found["folder"] / "policy.parquet") for r in g.rollouts]
    num_broken = sum(c.status == "error" for c in components)
    assert 0 < num_broken < 8
    assert policy["num_with_verdict"] == policy["num_correct"] == 8 - num_broken
    assert policy["verifier_failures"] == [{"component": "accuracy", "status": "error", "count": num_broken}]
    assert f"{num_broken} broke on 8 answers, left out, not counted as wrong (accuracy: {num_broken} error)" in printed
    assert f"{8 - num_broken} of {8 - num_broken} right = 100.0%" in printed


def test_nothing_is_overwritten(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    call = ["eval", "run", "evaluation.num_samples=0"]
    done = [run(*call, folder=tmp_path) for _ in range(2)]
    named = [run(*call, "--out", "kept.json", folder=tmp_path) for _ in range(2)]

    assert [d.returncode for d in done] == [0, 0]
    files = sorted((tmp_path / "run" / "evaluations").glob("step-000006_*.json"))
    assert len(files) == 2 and all(
        f"numbers  run/evaluations/{f.name}" in "".join(d.stdout for d in done) for f in files
    )
    assert all(file.with_suffix("").joinpath("policy.parquet").is_file() for file in files)
    assert named[0].returncode == 0 and (tmp_path / "kept" / "policy.parquet").is_file()
    check(named[1], "--out is kept.json, but kept.json is there already; expected the name of a new file")


@pytest.fixture(scope="module")
def other(tiny_overrides, trained) -> Path:
    """Another model, another adapter, fewer held-out rows of the same file; a chat template of its own."""
    model = save_tiny_model(trained.parent / "other_model", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>", "[assistant]")
    tokenizer.save_pretrained(model)
    settings = ["model.path=other_model", "lora.rank=4", "training.num_steps=2", "evaluation.num_prompts=4"]
    done = run(*tiny_overrides, *settings, "hydra.run.dir=other", folder=trained.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return trained.parent / "other"


def test_two_runs_of_other_bases_answer_the_same_problems(trained, other):
    found, printed = evaluated(trained, "--against", "other", "evaluation.num_samples=2")
    policy, against = found["policy"], found["against"]
    state = read_checkpoint(other / "checkpoints" / "step-000002").state

    assert against["fingerprint"] == state["adapter_fingerprint"] and against["config"]["lora"]["rank"] == 4
    assert against["model"]["name"] == "other_model"
    ours, theirs = (read_groups(found["folder"] / f"{name}.parquet") for name in ("policy", "against"))
    assert [g.prompt.columns for g in ours] == [g.prompt.columns for g in theirs] and len(ours) == 8
    assert all(a.prompt.text != b.prompt.text for a, b in zip(ours, theirs, strict=True))
    right = [sum(g.rollouts[0].components["accuracy"].value for g in groups) for groups in (theirs, ours)]
    assert found["paired"][0]["difference"] == pytest.approx((right[1] - right[0]) / 8)
    assert policy["metrics"]["eval/accuracy"] == right[1] / 8
    assert "model.path is " in printed and "of step 2 of other it is other_model" in printed
    assert "8 of 8 prompts are written otherwise, by each model's chat template" in printed
    # it held out the first 4 of these 8 rows, and trained on the others
    assert "warning: other trained on rows of" in printed


def test_a_policy_of_all_weights_and_its_base(tiny_overrides, tmp_path):
    settings = ["training.parameters=full", "optim.lr=0.003", "model.dtype=bfloat16", "algorithm.kl_coef=0.01"]
    done = run(*tiny_overrides, *settings, "training.num_steps=4", "hydra.run.dir=run", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found, printed = evaluated(tmp_path / "run", "--against", "base")
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000004").state

    assert found["policy"]["fingerprint"] == state["adapter_fingerprint"] != found["against"]["fingerprint"]
    for side, step in (("policy", 4), ("against", 0)):
        own = own_metrics(tmp_path / "run", step)
        assert {key: found[side]["metrics"][key] for key in own} == own
        recorded = tmp_path / "run" / "rollouts" / f"eval-step-{step:06d}.parquet"
        assert answers(found["folder"] / f"{side}.parquet") == answers(recorded)
    again, printed = evaluated(tmp_path / "run", "model.dtype=float32")
    assert "its fingerprint was " + state["adapter_fingerprint"] in printed
    assert "the weights were bfloat16 then and are float32 now" in printed
    assert "warning: model.dtype is float32, in training it was bfloat16" in printed


def test_what_was_fine_tuned_is_evaluated_with_rewards(tiny_folder, tmp_path):
    rows = [{"question": f"{a}+{b}", "answer": "aaaaaa"} for a in range(8) for b in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    settings = [
        "+exp=sft_gsm8k", f"model.path={tiny_folder}", "model.dtype=float32", "hardware.num_threads=1",
        "data.path=rows.jsonl", "data.system_prompt=null", "data.examples=[]", "sft.rows_per_step=8", "optim.lr=0.02",
        "sft.loss_on=all", "training.num_steps=12", "evaluation.num_prompts=8", "lora.dropout=0.1",
    ]  # fmt: skip
    done = run(*settings, "hydra.run.dir=run", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rewards = ["rewards.components.accuracy={path: tests.loops.letter_reward.accuracy}"]
    rewards += ["rewards.allowed_prefixes=[tests.loops.]", "sampling.max_tokens=12"]
    found, printed = evaluated(tmp_path / "run", *rewards, "data.path=new.jsonl", "--against", "base")

    assert found["policy"]["num_correct"] == 6 and found["against"]["num_correct"] < 6
    assert found["policy"]["config"]["stage"] == "rl" and found["policy"]["config"]["sft"]["loss_on"] == "completion"
    assert "all rows of data.path=new.jsonl are taken as held out" in printed
    check(run("eval", "run", folder=tmp_path), "run is a run of stage=sft, which has no rewards to score answers with")
    assert run("eval", "run", *rewards, "data.path=rows.jsonl", folder=tmp_path).returncode == 0


def test_without_a_run_the_base_is_evaluated(tiny_overrides, trained, tmp_path):
    done = run_afresh("eval", "+exp=grpo_gsm8k", *tiny_overrides, "evaluation.num_prompts=40", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "outputs").glob("tiny/eval_*/evaluations/untrained_*.json")
    found = json.loads(file.read_text())
    assert found["policy"]["metrics"]["eval/num"] == 40 and found["policy"]["step"] == 0  # nothing was trained on
    theirs = {r.prompt.columns["question"]: r.completion.token_ids for r in greedy_of(trained, 0)}
    ours = {r.prompt.columns["question"]: r.completion.token_ids for r in greedy_of(file.with_suffix(""))}
    assert theirs.keys() <= ours.keys() and all(ours[question] == theirs[question] for question in theirs)


def greedy_of(folder: Path, step: int | None = None):
    file = folder / "policy.parquet" if step is None else folder / "rollouts" / f"eval-step-{step:06d}.parquet"
    return [group.rollouts[0] for group in read_groups(file)]


MISTAKES = {
    "no run": (["nowhere"], "there is no folder nowhere; expected the folder of a run"),
    "nothing": ([], "eval needs the folder of a run, or +exp=NAME; expected: python -m rlbench eval RUN"),
    "unknown step": (
        ["run", "--step", "3"],
        "--step is 3, of which no checkpoint was kept in run; expected one of: 2, 4, 6",
    ),
    "no step": (["run", "--step", "x"], "--step is x, expected one of: 2, 4, 6, last, best"),
    "no value": (["run", "--step"], "argument --step: expected one argument; expected: python -m rlbench eval RUN"),
    "no best": (["other", "--step", "best"], "--step is best, but checkpoint.keep_best is null"),
    "step of no run": (["+exp=grpo_gsm8k", "--step", "3"], "--step is 3, but no run is given"),
    "base of the base": (["+exp=grpo_gsm8k", "--against", "base"], "--against is base, but so is the policy"),
    "stage": (["+exp=sft_gsm8k"], "stage is sft, but eval samples a policy; expected an experiment of stage=rl"),
    "nothing to resume": (["+exp=grpo_gsm8k", "resume=run"], "resume is run, but eval goes on with nothing"),
    "no prompts": (["run", "evaluation.num_prompts=0", "evaluation.num_samples=0"], "evaluation.num_prompts is 0, so"),
    "trained on": (["run", "evaluation.num_prompts=9"], "run held out at most 8 rows of"),
    "other split": (["run", "data.seed=1"], "data.seed is 1, but run chose its held-out rows of"),
    "too few rows": (["few"], "there are no held-out prompts: few.jsonl: 1 rows, of which at most a fifth is held out"),
    "no file": (["run", "data.path=no.jsonl"], "is no.jsonl, but there is no such file"),
    "other base": (["run", "model.path=other_model"], "the weights of run were trained with"),
    "other adapter": (["run", "lora.rank=4"], "lora.rank is 4, but the weights of run were trained with 16"),
    "an adapter on top": (["run", "lora.init_from=other"], "lora.init_from is other, but the weights are those of"),
    "no effect": (["run", "optim.lr=1"], "optim.lr=1 changes nothing of an evaluation; expected settings of data"),
    "unknown key": (["run", "sampling.temp=1"], "there is no key 'sampling.temp'"),
    "no engine": (["run", "engine=recorded", "engine.recorded_from=run"], "engine.kind is recorded, which generates"),
    "context": (["run", "sampling.max_tokens=256"], "sampling.max_tokens is 256, but the model's context is 256"),
    "against nothing": (["run", "--against", "no@2"], "--against is no@2, but no is no folder; expected base or"),
    "against no step": (
        ["run", "--against", "other@5"],
        "the step of --against is 5, of which no checkpoint was kept in other",
    ),
    "against itself": (["run", "--against", "run@6"], "--against is run@6, which is the policy itself"),
    "no json": (["run", "--out", "x.txt"], "--out is x.txt, expected a file that ends in .json"),
    "chain": (
        ["chain"],
        "chain is a chain of runs; expected the folder of one of its stages: chain/1_sft, chain/2_grpo",
    ),
    "reward model": (["judge"], "judge is a run of stage=reward_model, which answers nothing"),
    "no checkpoint": (["bare"], "bare has no valid checkpoint; expected a run that saved one"),
}


@pytest.fixture(scope="module")
def mistaken(trained, other) -> Path:
    """A folder with all that can be named wrongly."""
    folder = trained.parent
    config = (trained / "config.yaml").read_text()
    for name in ("chain/1_sft", "chain/2_grpo", "judge", "bare"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(config)
    (folder / "chain" / "chain.json").write_text("{}")
    judge = yaml.safe_load(config)
    shutil.copytree(trained, folder / "few")
    few = {**judge, "data": {**judge["data"], "path": "few.jsonl"}}
    (folder / "few" / "config.yaml").write_text(json.dumps(few))
    judge = {
        key: value
        for key, value in judge.items()
        if key not in ("rewards", "algorithm", "sampling", "engine", "checks")
    }
    judge |= {"stage": "reward_model", "evaluation": {**judge["evaluation"], "num_samples": 0}}
    (folder / "judge" / "config.yaml").write_text(json.dumps(judge))
    (folder / "few.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    return folder


OF_THE_COMMAND_LINE = ["no run", "nothing", "unknown key"]


@pytest.mark.parametrize("name", [name for name in MISTAKES if "+exp" not in "".join(MISTAKES[name][0])])
def test_a_mistake_leaves_nothing(mistaken, monkeypatch, name):
    arguments, sentence = MISTAKES[name]
    before = sorted(mistaken.rglob("*"))
    monkeypatch.chdir(mistaken)

    with pytest.raises((ValueError, *CONFIG_ERRORS)) as raised:
        eval_run(parse(arguments))

    assert sentence in explain_config_error(raised.value, arguments)
    assert sorted(mistaken.rglob("*")) == before


@pytest.mark.parametrize("name", [n for n in MISTAKES if n in OF_THE_COMMAND_LINE or "+exp" in "".join(MISTAKES[n][0])])
def test_a_mistake_is_one_sentence_and_leaves_nothing(mistaken, name):
    arguments, sentence = MISTAKES[name]
    before = sorted(mistaken.rglob("*"))

    check(run("eval", *arguments, folder=mistaken), sentence)

    assert sorted(mistaken.rglob("*")) == before
