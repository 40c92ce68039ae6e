"""Rows of reasoning-gym: disjoint splits, the same for the same seed, scored by their rewards."""

import pytest

from rlbench.config.schema import DataConfig
from rlbench.data.sources import load_rows
from rlbench_rewards import RewardSample
from rlbench_rewards.countdown import Countdown
from rlbench_rewards.reasoning_task import ReasoningTask


def rows_of(name: str, split: str, **options) -> list[dict]:
    return list(load_rows(DataConfig(name=name, limit=30, **options), split).dataset)


def test_splits_share_no_question_and_a_seed_repeats():
    train, test = (rows_of("reasoning_gym/chain_sum", split) for split in ("train", "test"))

    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert train == rows_of("reasoning_gym/chain_sum", "train")
    assert train != rows_of("reasoning_gym/chain_sum", "train", seed=1)
    assert [row["row_number"] for row in train] == list(range(1, 31))


@pytest.mark.parametrize(
    ("name", "reward"),
    [("countdown", Countdown()), ("chain_sum", ReasoningTask("chain_sum"))],
    ids=["countdown", "chain_sum"],
)
def test_every_gold_answer_scores_one_with_the_reward_that_conf_pairs_with_it(name, reward):
    for row in rows_of(f"reasoning_gym/{name}", "train"):
        sample = RewardSample(prompt="", completion=f"<answer>{row['answer']}</answer>", columns=row)
        assert reward(sample).value == 1.0, row
        wrong = RewardSample(prompt="", completion="<answer>1+1</answer>", columns=row)
        assert reward(wrong).value == 0.0


def test_parameters_reach_the_task_and_wrong_names_are_told():
    rows = rows_of("reasoning_gym/chain_sum", "train", task_params={"min_terms": 5, "max_terms": 5})

    assert all(row["question"].count("+") + row["question"].count(" - ") == 4 for row in rows)
    with pytest.raises(ValueError, match="data.task_params do not fit chain_sum: .*min_trems"):
        rows_of("reasoning_gym/chain_sum", "train", task_params={"min_trems": 5})
    with pytest.raises(ValueError, match="reasoning-gym has no task 'chain_sums'; nearest: chain_sum"):
        rows_of("reasoning_gym/chain_sums", "train")
