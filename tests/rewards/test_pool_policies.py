"""Retries, batches, quarantine, back-pressure, and what is counted."""

import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from rlbench_rewards import RewardPool, RewardSample

PREFIXES = ["tests.rewards.bad_rewards."]


def spec(name: str, **more) -> dict:
    return {"name": name, "path": f"tests.rewards.bad_rewards.{name}", "kwargs": {}, **more}


def pool_of(*specs, **options) -> RewardPool:
    return RewardPool(list(specs), **{"num_workers": 1, "timeout_s": 5, "allowed_prefixes": PREFIXES, **options})


def sample(completion: str, **columns) -> RewardSample:
    return RewardSample(prompt="", completion=completion, columns=columns)


def test_an_error_is_final_without_retries_and_tried_again_with_them(tmp_path):
    with pool_of(spec("fail_twice")) as pool:
        (result,) = pool.score([sample("", marker=str(tmp_path / "a"))])
        assert (result["fail_twice"].status, result["fail_twice"].num_tries) == ("error", 1)
    with pool_of(spec("fail_twice"), max_retries=2) as pool:
        (result,) = pool.score([sample("", marker=str(tmp_path / "b"))])
        assert (result["fail_twice"].value, result["fail_twice"].num_tries) == (1.0, 3)
        assert pool.stats.take()["reward_pool/num_retries"] == 2


def test_a_sample_that_kills_two_workers_is_not_run_again(tmp_path):
    poison = sample("", marker=str(tmp_path / "calls"))
    with pool_of(spec("count_and_die"), max_retries=5) as pool:
        first, second = pool.score([poison])[0], pool.score([poison])[0]
        stats = pool.stats.take()

    assert first["count_and_die"].status == second["count_and_die"].status == "error"
    assert "died twice" in first["count_and_die"].message and "quarantined" in second["count_and_die"].message
    assert (tmp_path / "calls").read_text() == "xx"
    assert (stats["reward_pool/num_quarantined"], stats["reward_pool/num_error"]) == (1, 2)


def test_batches_come_together_and_a_batch_that_fails_costs_only_the_bad_sample():
    with pool_of(spec("trl_batch_size", batch_size=4), spec("trl_behave", batch_size=4), timeout_s=1) as pool:
        texts = ["fine", "raise", "fine", "fine", "fine", "exit", "not mine", "fine", "sleep"]
        results = pool.score([sample(text) for text in texts])

    assert [r["trl_batch_size"].value for r in results] == [4, 4, 4, 4, 4, 4, 4, 4, 1]
    statuses = ["value", "error", "value", "value", "value", "error", "skipped", "value", "timeout"]
    assert [r["trl_behave"].status for r in results] == statuses
    assert [r["trl_behave"].value for r in results] == [0.5, None, 0.5, 0.5, 0.5, None, None, 0.5, None]


def test_a_wrong_number_of_outputs_is_an_error_of_all():
    with pool_of(spec("TooMany", batch_size=3)) as pool:
        results = pool.score([sample("")] * 3)

    assert [r["TooMany"].status for r in results] == ["error"] * 3
    assert "outputs for 1 samples" in results[0]["TooMany"].message


def test_async_batched_and_message_style_rewards():
    specs = (
        spec("wait_a_little", batch_size=10),
        spec("trl_async", batch_size=2),
        spec("Batched", batch_size=5),
        spec("trl_messages", as_messages=True),
    )
    with pool_of(*specs) as pool:
        start = time.monotonic()
        results = pool.score([sample("x" * i, answer="") for i in range(10)])
        elapsed = time.monotonic() - start

    assert [r["wait_a_little"].value for r in results] == [float(i) for i in range(10)]
    assert [r["trl_async"].value for r in results] == [float(i) for i in range(10)]
    assert [r["Batched"].value for r in results] == [5.0] * 10
    assert [r["trl_messages"].value for r in results] == [float(i + 1) for i in range(10)]
    assert elapsed < 4  # ten waits of 0.5 s ran side by side


def test_submitting_more_than_the_queue_holds_waits():
    with pool_of(spec("slow"), max_pending=2) as pool:
        start = time.monotonic()
        future = pool.submit([sample("")] * 12)
        submitting = time.monotonic() - start

        assert submitting > 0.3 and not future.done()
        assert [r["slow"].value for r in future.result()] == [1.0] * 12


def test_many_threads_get_their_own_answers():
    with pool_of(spec("length"), num_workers=2) as pool:
        answers: dict[int, list] = {}

        def ask(number: int) -> None:
            answers[number] = [r["length"].value for r in pool.score([sample("x" * number)] * 5)]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert answers == {number: [float(number)] * 5 for number in range(64)}


def test_workers_killed_again_and_again_cost_no_answer_and_are_counted():
    with pool_of(spec("slow"), spec("length"), num_workers=2) as pool:
        future = pool.submit([sample("x" * i) for i in range(60)])
        num_killed = 0
        while not future.done() and num_killed < 5:
            time.sleep(0.01)
            for worker in pool._workers:
                if worker is not None and worker.num_calls >= 12:  # one that starts is left alone
                    with suppress(ProcessLookupError):
                        os.kill(worker.pid, signal.SIGKILL)
                        num_killed += 1
                        worker.num_calls = 0
        results = future.result()
        stats = pool.stats.take()
        restored = pool.score([sample("xx")] * 4)

    values = [r["length"].value for r in results if r["length"].status == "value"]
    assert values == [float(i) for i in range(60)]
    assert num_killed >= 2 and stats["reward_pool/num_restarts"] >= 1
    assert [r["length"].value for r in restored] == [2.0] * 4


def test_counts_and_latencies_are_taken_once():
    with pool_of(spec("misbehave"), timeout_s=0.5) as pool:
        pool.score([sample(text) for text in ("fine", "fine", "raise", "sleep")])
        stats, nothing = pool.stats.take(), pool.stats.take()

    assert {k.split("/")[1]: v for k, v in stats.items() if "num" in k and v} == {
        "num_value": 2, "num_error": 1, "num_timeout": 1}  # fmt: skip
    assert 0 < stats["reward_pool/latency_p50_s"] < stats["reward_pool/latency_p99_s"] + 1
    assert "reward_pool/latency_p50_s" not in nothing and not any(nothing.values())


def test_a_closed_pool_says_so():
    pool = pool_of(spec("slow"))
    future = pool.submit([sample("")] * 50)
    pool.close()

    with pytest.raises(RuntimeError, match="closed|replaced"):
        future.result(timeout=5)
    with pytest.raises(RuntimeError, match="the reward pool is closed"):
        pool.submit([sample("")])


BAD_STARTS = {
    "trl_needs_difficulty": "needs the column 'difficulty', but the data has question, answer",
    "trl_needs_ids": "which needs 'completion_ids' of TRL's trainer; expected a function of completions, prompts and",
    "NoCall": "whose instances cannot be called",
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_what_a_reward_needs_and_the_data_lack_is_an_error_at_start(name):
    with pytest.raises(ValueError, match=BAD_STARTS[name]):
        pool_of(spec(name), columns=["question", "answer"])


def test_a_class_names_the_columns_it_needs():
    with pytest.raises(ValueError, match="Batched, which needs the column 'answer', but the data has question"):
        pool_of(spec("Batched"), columns=["question"])
    with pool_of(spec("Batched"), columns=["question", "answer"]):
        pass
