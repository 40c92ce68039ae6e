"""Parts of the command eval: its arguments, what is held out, pairs by hand, files that are never overwritten."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlbench.commands.eval import overrides_for_hydra, parse
from rlbench.commands.eval_files import reserve
from rlbench.commands.eval_held_out import hold_out, seen_by
from rlbench.commands.eval_paired import compare
from rlbench.commands.eval_settings import run_settings, settings_like
from rlbench.commands.eval_text import paired_lines
from rlbench.commands.eval_weights import Side, split_place
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.schema import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    RewardConfig,
    RewardsConfig,
    RunConfig,
    SamplingConfig,
)
from rlbench.loops.evaluate import Evaluation
from rlbench.records import Completion, Prompt, Rollout, RolloutGroup


def test_options_and_settings_are_told_apart():
    found = parse(["run", "data=math", "--step", "best", "--against", "base", "--out", "a.json", "~data.examples"])

    assert (found.run_folder, found.step, found.against, found.out) == (Path("run"), "best", "base", Path("a.json"))
    assert found.overrides == ["data=math", "~data.examples"]
    alone = parse(["+exp=grpo_gsm8k", "seed=1"])
    assert alone.run_folder is None and alone.step == "last" and alone.overrides == ["+exp=grpo_gsm8k", "seed=1"]
    assert overrides_for_hydra(alone)[-1].startswith("hydra.run.dir='outputs/${name}/eval_")
    assert overrides_for_hydra(parse(["+exp=a", "hydra.run.dir=x"])) == ["+exp=a", "hydra.run.dir=x"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a/b", ("a/b", "last")),
        ("a/b@12", ("a/b", "12")),
        ("a/b@best", ("a/b", "best")),
        ("a@b/c", ("a@b/c", "last")),
        ("a@2/b@last", ("a@2/b", "last")),
    ],
)
def test_a_run_may_name_its_step(text, place):
    assert split_place(text) == (Path(place[0]), place[1])


def config_of(**data) -> RunConfig:
    rewards = RewardsConfig(components={"accuracy": RewardConfig(path="rlbench_rewards.math_answer.MathAnswer")})
    return RunConfig(rewards=rewards, data=DataConfig(**data), evaluation=EvaluationConfig(num_prompts=8))


RUN = Path("run")


def test_the_runs_own_split_is_kept():
    trained, config = config_of(path="a.jsonl"), config_of(path="./a.jsonl")

    assert hold_out(config, trained, RUN) == [] and config.data.eval_path is None
    config.evaluation.num_prompts = 9
    with pytest.raises(ValueError, match="is 9, but run held out at most 8 rows of ./a.jsonl and trained on the rest"):
        hold_out(config, trained, RUN)
    for name, value in (("seed", 1), ("shuffle", False)):
        with pytest.raises(ValueError, match=f"data.{name} is {value}, but run chose its held-out rows"):
            hold_out(config_of(path="a.jsonl", **{name: value}), trained, RUN)


def test_a_file_without_held_out_rows_is_not_evaluated():
    trained = config_of(path="a.jsonl", eval_path="b.jsonl")

    with pytest.raises(ValueError, match="data.path is a.jsonl, whose rows run trained on, holding out none"):
        hold_out(config_of(path="a.jsonl"), trained, RUN)
    none = config_of(path="a.jsonl")
    none.evaluation.num_prompts = 0
    with pytest.raises(ValueError, match="holding out none"):
        hold_out(config_of(path="a.jsonl"), none, RUN)


def test_another_file_is_held_out_whole_and_the_training_file_is_not_read():
    trained = config_of(path="a.jsonl", eval_path="b.jsonl")
    new, kept, seen = (
        config_of(path="c.jsonl"),
        config_of(path="a.jsonl", eval_path="b.jsonl"),
        config_of(eval_path="a.jsonl"),
    )

    assert hold_out(new, trained, RUN) == ["all rows of data.path=c.jsonl are taken as held out"]
    assert (new.data.path, new.data.eval_path) == ("c.jsonl", "c.jsonl")
    assert hold_out(kept, trained, RUN) == [] and (kept.data.path, kept.data.eval_path) == ("b.jsonl", "b.jsonl")
    assert hold_out(seen, trained, RUN) == ["run trained on rows of data.eval_path=a.jsonl"]
    named = config_of()
    assert hold_out(named, trained, RUN) == [] and named.data.path is None


def test_another_run_that_trained_on_the_prompts_is_named():
    config = config_of(path="a.jsonl")
    same, fewer, shuffled = config_of(path="a.jsonl"), config_of(path="a.jsonl"), config_of(path="a.jsonl", seed=1)
    fewer.evaluation.num_prompts = 4

    assert (
        seen_by(same, RUN, config)
        == []
        == seen_by(config_of(path="b.jsonl"), RUN, config)
        == seen_by(same, RUN, config_of())
    )
    for other in (fewer, shuffled, config_of(path="a.jsonl", eval_path="b.jsonl")):
        assert seen_by(other, RUN, config) == ["run trained on rows of a.jsonl that are evaluated here"]


def test_what_only_training_reads_is_left_out():
    trained = config_of(path="a.jsonl")
    trained.algorithm = AlgorithmConfig(kl_coef=0.1, overlong_buffer_tokens=64)
    trained.engine = EngineConfig(kind="recorded", recorded_from="x")
    trained.lora = LoraConfig(rank=4, init_from="gone")
    trained.model = ModelConfig(path="m")
    found = run_settings(RUN, trained, ["sampling.max_tokens=32", "model.dtype=float32"])

    assert found.algorithm == AlgorithmConfig() and found.engine.kind == "auto" and found.lora == LoraConfig(rank=4)
    assert (found.sampling.max_tokens, found.model.dtype, found.data.path) == (32, "float32", "a.jsonl")


def test_another_run_is_asked_the_same_with_its_own_model():
    config = config_of(path="a.jsonl", seed=5)
    config.sampling, config.seed = SamplingConfig(max_tokens=7), 3
    other = config_of(path="b.jsonl")
    other.model, other.lora = ModelConfig(path="m", dtype="bfloat16"), LoraConfig(rank=4)
    found = settings_like(config, RUN, other, ["model.dtype=float32", "data.seed=9", "sampling.max_tokens=8"])

    assert (found.data, found.sampling, found.seed) == (config.data, config.sampling, 3)
    assert (found.model.path, found.model.dtype, found.lora.rank) == ("m", "float32", 4)


@dataclass
class Answers:
    """What is compared of a policy."""

    is_correct: dict
    sampled: dict = field(default_factory=dict)
    rewards: dict = field(default_factory=dict)

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(step=0, is_correct=self.is_correct, metrics={}, sampled=self.sampled)

    @property
    def side(self) -> Side:
        return Side(name="it")

    @property
    def groups(self) -> list[RolloutGroup]:
        return [rewarded(name, reward) for name, reward in self.rewards.items()]


def rewarded(name: str, reward: float | None) -> RolloutGroup:
    prompt = Prompt(prompt_id=name, text="", token_ids=(1,))
    completion = Completion(
        token_ids=(2,), sampling_logprobs=(-1.0,), finish_reason="stop", seed=0, policy_version=0,
        adapter_fingerprint="base",
    )  # fmt: skip
    rollout = Rollout(
        rollout_id=name, prompt=prompt, completion=completion, completion_text="", sample_index=0, components={},
        reward=reward,
    )  # fmt: skip
    return RolloutGroup(prompt=prompt, rollouts=(rollout,))


def test_pairs_by_hand():
    # of the four that both answered: +1, +1, 0, -1, so mean 1/4, variance (2 * 9/16 + 1/16 + 25/16) / 3 = 11/12
    before = Answers({"a": False, "b": False, "c": True, "d": True, "e": True})
    after = Answers({"a": True, "b": True, "c": True, "d": False, "f": True})
    (found,) = compare(after, before)

    assert (found.what, found.num, found.num_gained, found.num_lost, found.p) == ("accuracy", 4, 2, 1, 1.0)
    assert (found.before, found.after, found.difference) == (0.5, 0.75, 0.25)
    half_width = 1.96 * (11 / 12 / 4) ** 0.5
    assert (found.low, found.high) == (pytest.approx(0.25 - half_width), pytest.approx(0.25 + half_width))
    assert paired_lines(after, before, [found]) == [
        "it less it, prompt by prompt",
        "  accuracy: +25.0 points (95% -68.8 to +118.8); 2 gained, 1 lost of 4, p = 1: no more than chance",
    ]


def test_equal_answers_are_no_proof_of_equality():
    same = Answers({"a": True, "b": True, "c": False}, sampled={"a": 0.5, "b": 0.25})
    accuracy, sampled = compare(same, same)

    assert accuracy.difference == 0 and accuracy.low < -0.3 and accuracy.high > 0.3
    assert sampled.what == "sampled accuracy" and sampled.low < -0.3 < 0.3 < sampled.high


def test_without_accuracy_rewards_are_compared():
    before = Answers({}, rewards={"a": 0.5, "b": 1.0, "c": None, "d": 0.0})
    after = Answers({}, rewards={"a": 0.75, "b": 1.0, "c": 1.0, "d": None})
    (found,) = compare(after, before)

    assert (found.what, found.num, found.num_gained, found.num_lost) == ("reward", 2, 1, 0)
    assert found.difference == 0.125 and found.low < 0.125 < found.high
    (alone,) = compare(Answers({}, rewards={"a": 1.0}), Answers({}, rewards={"a": 0.0}))
    assert alone.low is None and "(no interval: too few prompts)" in paired_lines(after, before, [alone])[1]
    assert compare(Answers({}, rewards={"a": 1.0}), Answers({}, rewards={"b": 0.0})) == []


def test_two_evaluations_of_one_second_have_places_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "now")
    found = [reserve(tmp_path, "step-000002", None) for _ in range(3)]

    assert [p.numbers.name for p in found] == [f"step-000002_now{end}.json" for end in ("", "_2", "_3")]
    assert all(p.answers.is_dir() for p in found)
    for places in found:
        places.give_up()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept(tmp_path):
    (tmp_path / "a.json").write_text("mine")
    (tmp_path / "b").mkdir()

    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"{name}.json, but .* is there already"):
            reserve(tmp_path, "step", tmp_path / f"{name}.json")
    assert (tmp_path / "a.json").read_text() == "mine" and not (tmp_path / "a").exists()
