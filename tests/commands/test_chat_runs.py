"""`chat` as whole commands on runs of the tiny model: the answers are those of the named step, to the token."""

import subprocess
import sys

import pytest

from rlbench.tracking.safe_text import printable
from rlbench.training.checkpoint import read_checkpoint
from tests.commands.chat_runs import answers, question_of, recorded, talk, train
from tests.loops.conftest import ENVIRONMENT, end_of_the_fork_server, tiny_overrides  # noqa: F401 (fixtures)
from tests.loops.test_user_errors import check

STEPS = ["training.num_steps=6", "checkpoint.every_steps=2", "checkpoint.keep_last=6", "evaluation.every_steps=2"]


@pytest.fixture(scope="module")
def finished(tiny_overrides, tmp_path_factory):  # noqa: F811
    return train(tmp_path_factory.mktemp("finished"), *tiny_overrides, *STEPS, "checkpoint.keep_best=eval/share")


def first_line(row: dict) -> dict:
    """A rollout whose text is one line that is not blank at its ends, as a terminal shows it."""
    return row if row["completion_text"] == row["completion_text"].strip() and row["completion_text"] else {}


def sampled_by(run_folder, version: int) -> dict:
    rows = [row for row in recorded(run_folder, version + 1) if first_line(row) and "\n" not in row["completion_text"]]
    assert rows[0]["policy_version"] == version
    return rows[0]


@pytest.mark.parametrize("step", [2, 4])
def test_a_step_answers_as_it_did_in_the_run(finished, step):
    """The next step's rollouts were sampled by it: prompt and seed give their tokens again, those of others do not."""
    row, other = sampled_by(finished, step), 6 - step
    said = [question_of(row), "/new", f"/step {other}", question_of(row)]
    done = talk(finished, "--step", str(step), "--seed", str(row["seed"]), said=said)
    state = read_checkpoint(finished / "checkpoints" / f"step-{step:06d}").state

    assert done.returncode == 0, done.stdout + done.stderr
    first, second = answers(done.stdout)
    assert first.text == printable(row["completion_text"]) != second.text
    assert first.facts["weights"] == f"step {step}, fingerprint {row['adapter_fingerprint']}"
    assert state["adapter_fingerprint"] == row["adapter_fingerprint"]
    assert int(first.facts["num_tokens"]) == len(row["token_ids"]) and first.facts["finish"] == row["finish_reason"]
    logprobs = row["sampling_logprobs"]
    assert float(first.facts["logprob"]) == pytest.approx(sum(logprobs) / len(logprobs), abs=6e-4)
    assert second.facts["weights"].startswith(f"step {other}, ") and second.facts["seed"] == str(row["seed"])
    for number in (step, other):
        assert f"step {number}: the engine holds the weights of run/checkpoints/step-{number:06d} bit for bit" in (
            done.stdout
        )


def test_policy_and_base_answer_one_below_the_other(finished):
    """An adapter that was never trained adds nothing: the first step's rollouts are the base's."""
    of_base, of_policy = sampled_by(finished, 0), sampled_by(finished, 4)
    arguments = ["--step", "4", "--compare", "base", "--seed"]
    one = talk(finished, *arguments, str(of_base["seed"]), said=[question_of(of_base)])
    two = talk(finished, *arguments, str(of_policy["seed"]), said=[question_of(of_policy), "and now?"])

    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert answers(one.stdout)[1].text == f"base:\n{printable(of_base['completion_text'])}"
    assert answers(one.stdout)[1].facts["weights"] == "base"
    assert answers(two.stdout)[0].text == f"step 4:\n{printable(of_policy['completion_text'])}"
    assert [a.text.split("\n")[0] for a in answers(two.stdout)] == ["step 4:", "base:"] * 2


def test_a_held_out_problem_is_answered_as_in_the_evaluation_with_all_rewards(finished):
    number = 3
    row = recorded(finished, 6, "eval")[number - 1]
    done = talk(finished, "sampling.temperature=0", said=[f"/problem {number}", "/new", question_of(row), "/retry"])

    assert done.returncode == 0, done.stdout + done.stderr
    posed, free, again = answers(done.stdout)
    assert f"a new conversation with {row['prompt_id']}:\n{question_of(row)}\n" in done.stdout
    shown = printable(row["completion_text"], keep_newlines=True)
    assert posed.text.endswith(shown) and free.text == again.text == shown
    share, accuracy = row["component_share"], row["component_accuracy"]
    assert posed.rewards == f"rewards: share {share:.4g}, accuracy {accuracy:.4g}; together {row['reward']:.4g}"
    assert free.rewards == f"rewards: share {share:.4g}"  # what is called accuracy needs a gold answer
    assert int(again.facts["seed"]) == int(free.facts["seed"]) + 1
    assert "sampling.temperature is 0: every seed gives the same answer" in done.stdout


def test_a_pipe_is_read_line_by_line_in_a_new_interpreter(finished):
    call = [sys.executable, "-m", "rlbench", "chat", "run", "--step", "best", "sampling.max_tokens=5"]
    done = subprocess.run(
        call, cwd=finished.parent, env=ENVIRONMENT, input="one\n\ntwo", capture_output=True, text=True, timeout=200
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "> one\n" in done.stdout and "> two\n" in done.stdout and "\x1b" not in done.stdout
    assert [answer.facts["num_tokens"] for answer in answers(done.stdout)] == ["5", "5"]
    assert "engine=hf, sampling.temperature=1, sampling.max_tokens=5, context 256 tokens" in done.stdout


def test_a_run_on_given_completions_answers_too(tiny_overrides, tmp_path):  # noqa: F811
    rows = next(override for override in tiny_overrides if override.startswith("data.path="))
    shared = [
        o for o in tiny_overrides if o.startswith(("model.", "hardware.", "data.system", "data.examples", "name"))
    ]
    trained = train(
        tmp_path, "+exp=sft_gsm8k", *shared, rows, "sft.rows_per_step=8", "training.num_steps=2",
        "evaluation.num_prompts=8", "optim.lr=0.02", "lora.dropout=0.1", "evaluation.every_steps=0",
    )  # fmt: skip
    done = talk(trained, "sampling.max_tokens=7", said=["1+2", "/step base", "1+2"])

    assert done.returncode == 0, done.stdout + done.stderr
    assert [a.facts["weights"].split(",")[0] for a in answers(done.stdout)] == ["step 2", "base"]
    assert {answer.facts["num_tokens"] for answer in answers(done.stdout)} <= set("1234567")


def test_all_weights_of_a_step_and_of_the_base_answer_as_in_the_run(tiny_overrides, tmp_path):  # noqa: F811
    settings = ["training.parameters=full", "optim.lr=0.003", "evaluation.num_prompts=0"]
    steps = ["training.num_steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    trained = train(tmp_path, *tiny_overrides, *settings, *steps)
    row, of_base = sampled_by(trained, 2), sampled_by(trained, 0)
    said = [question_of(row), "/new", "/step base", "hi", "/step 2", "/new", question_of(row)]
    done = talk(trained, "--step", "2", "--seed", str(row["seed"]), said=said)
    base = talk(trained, "--step", "base", "--seed", str(of_base["seed"]), said=[question_of(of_base)])

    assert done.returncode == base.returncode == 0, done.stdout + done.stderr + base.stderr
    found = answers(done.stdout)
    assert found[0].text == found[2].text == printable(row["completion_text"])
    assert found[0].facts["weights"] == f"step 2, fingerprint {row['adapter_fingerprint']}"
    assert answers(base.stdout)[0].text == printable(of_base["completion_text"])
    check(talk(trained, "--step", "7", said=["unread"]), "--step is 7, of which no checkpoint was kept")
    assert "error: /problem: the run holds no problems out (evaluation.num_prompts is 0)" in (
        talk(trained, said=["/problem 1"]).stdout
    )
