"""What plan and preflight measure is what a step of the algorithm does."""

import pytest

from rlbench.build import build, prepare
from rlbench.config.compose import to_run_config
from rlbench.data.packing import pack
from rlbench.planner.probes import largest_prompts, largest_step
from rlbench.planner.step_work import adapter_bytes, work_on
from rlbench.training import step
from tests.architecture.test_layout import compose

CASES = {  # forwards of the policy's modules, the critic's, the teacher's
    "algorithm=grpo": (1, 0, 0),
    "algorithm=ppo": (2, 2, 0),  # logprobs before several updates; values before them, and the critic's own update
    "algorithm=distillation algorithm.teacher.model=MODEL": (2, 0, 1),
    "algorithm.kl_coef=0.1 algorithm.kl_in=reward": (3, 0, 0),  # the policy, its base, and the update
    "algorithm.kl_coef=0.1": (2, 0, 0),
}


@pytest.fixture
def make_parts(tiny_overrides):
    opened = []

    def make(*options):
        names = ["evaluation.num_prompts=0", "hardware=cpu", "hardware.num_threads=1", "rewards.num_workers=1"]
        inputs = prepare(to_run_config(compose(*tiny_overrides, *names, *options)))
        opened.append(build(inputs))
        return inputs, opened[-1]

    yield make
    for parts in opened:
        parts.close()


@pytest.mark.parametrize("options", CASES)
def test_every_forward_of_a_step_is_made(make_parts, tiny_folder, monkeypatch, options):
    inputs, parts = make_parts(*options.replace("MODEL", str(tiny_folder)).split())
    num_forwards = {"policy": 0, "critic": 0, "teacher": 0}

    def count(owner, method, name):
        original = getattr(owner, method)

        def counted(*arguments):
            num_forwards[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, method, counted)

    count(parts.policy, "hidden", "policy")
    if parts.critic is not None:
        count(parts.critic, "values", "critic")
    if parts.teacher is not None:
        count(parts.teacher, "hidden", "teacher")
    (microbatch,) = pack(largest_step(inputs), tokens_per_microbatch=10_000, device="cpu")

    work_on(parts, inputs, microbatch)

    assert tuple(num_forwards.values()) == CASES[options]


def test_forwards_before_the_updates_count_once(make_parts):
    inputs, parts = make_parts("algorithm=ppo", "algorithm.num_updates=6", "algorithm.num_minibatches=2")
    (microbatch,) = pack(largest_step(inputs), tokens_per_microbatch=10_000, device="cpu")

    found = work_on(parts, inputs, microbatch)

    assert found.before_s > 0 and found.update_s > 0
    assert found.of_batch(inputs.config.algorithm) == pytest.approx(found.before_s + 3 * found.update_s)


@pytest.mark.parametrize("support", ["full", "sampler"])
def test_what_the_sampler_could_have_drawn_is_computed_where_the_run_does(make_parts, monkeypatch, support):
    inputs, parts = make_parts(f"algorithm.support={support}", "sampling.top_p=0.9", "algorithm.num_updates=2")
    (microbatch,) = pack(largest_step(inputs), tokens_per_microbatch=10_000, device="cpu")
    calls = []
    original = step.sampler_support
    monkeypatch.setattr(step, "sampler_support", lambda *arguments: (calls.append(1), original(*arguments))[1])

    work_on(parts, inputs, microbatch)

    assert len(calls) == (2 if support == "sampler" else 0)  # of the old policy, and in the update


def test_a_critic_is_trained_memory_too(make_parts):
    one, both = (adapter_bytes(make_parts(algorithm)[1]) for algorithm in ("algorithm=grpo", "algorithm=ppo"))

    assert both == pytest.approx(2 * one, rel=0.05) and both > 2 * one  # a second adapter and a head


def test_a_curriculum_may_draw_the_longest_prompts_together(make_parts):
    inputs, _ = make_parts("algorithm.curriculum.is_on=true")
    lengths = sorted((len(prompt.token_ids) for prompt in inputs.train.prompts), reverse=True)

    assert [len(prompt.token_ids) for prompt in largest_prompts(inputs)] == lengths[:4]
