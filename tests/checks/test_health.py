"""Each health rule finds its fault and stays silent beside it; a healthy run has no finding at all."""

from collections.abc import Callable

import pytest

from rlbench.checks.health import EXPLAINS, RULES, find_problems
from rlbench.checks.health_history import SEVERITIES, History

NUM_STEPS = 40
CONFIG = {
    "algorithm": {"group_size": 8, "advantage": "group_relative", "kl_coef": 0.0, "importance": "truncate"},
    "optim": {"lr": 1e-4, "max_grad_norm": 1.0},
    "sampling": {"max_tokens": 256, "temperature": 1.0},
    "rewards": {"timeout_s": 5.0, "components": {"accuracy": {"weight": 1.0}, "format": {"weight": 0.5}}},
    "checks": {"drift_warn_nats": 0.1},
    "evaluation": {"num_prompts": 400},
}


def wobble(i: int) -> float:
    """Deterministic noise in [-1, 1] without a trend."""
    return ((i * 37) % 11 - 5) / 5


def healthy_row(i: int) -> dict:
    """Accuracy climbs from 30% to 60%, everything else is calm."""
    t = i / (NUM_STEPS - 1)
    accuracy = 0.3 + 0.3 * t + 0.03 * wobble(i)
    form = 0.9 + 0.02 * wobble(i + 3)
    return {
        "step": i + 1,
        "phase": "train",
        "reward/mean": accuracy + 0.5 * form,
        "reward/std": 0.45,
        "reward/accuracy": accuracy,
        "accuracy/train": accuracy,
        "reward/format": form,
        "reward/error_frac": 0.0,
        "reward/timeout_frac": 0.0,
        "completion/length_tokens_mean": 120 + 10 * t + 5 * wobble(i),
        "completion/truncated_frac": 0.03,
        "groups/no_signal_frac": 0.2 + 0.05 * wobble(i),
        "groups/length_reward_correlation": 0.1,
        "groups/repeated_completion_frac": 0.05,
        "policy/entropy": 1.2 - 0.4 * t,
        "policy/kl_to_old": 0.001,
        "kl/reference": 0.02 * t,
        "loss/clip_frac": 0.01,
        "optim/grad_norm": 0.3 + 0.1 * wobble(i),
        "optim/is_skipped": 0.0,
        "drift/level": 0.0,
        "drift/logprob_gap_mean": 0.03,
        "drift/ess_frac": 0.997,
        "identity/adapter_effect_mean": 0.05 * t,
        "rollouts/masked_frac": 0.0,
    }


def evaluation(step: int, accuracy: float, num: int = 400) -> dict:
    half = 0.98 / num**0.5
    return {
        "step": step,
        "phase": "eval",
        "eval/num": float(num),
        "eval/accuracy": accuracy,
        "eval/reward": accuracy + 0.45,
        "eval/accuracy_low": max(0.0, accuracy - half),
        "eval/accuracy_high": min(1.0, accuracy + half),
    }


def rows(**changes: float | None | Callable[[int], float]) -> list[dict]:
    """Healthy rows with some keys replaced (`reward__mean` for reward/mean); None removes a key."""
    made = []
    for i in range(NUM_STEPS):
        row = healthy_row(i)
        for name, value in changes.items():
            key = name.replace("__", "/")
            row[key] = value(i) if callable(value) else value
        made.append({key: value for key, value in row.items() if value is not None})
    return made


def found(train, evaluations=None, config=None) -> list[str]:
    evaluations = [evaluation(0, 0.3), evaluation(NUM_STEPS, 0.55)] if evaluations is None else evaluations
    return [finding.rule for finding in find_problems(train, evaluations, config or CONFIG)]


def with_group_size(size: int, advantage: str = "group_relative") -> dict:
    return {**CONFIG, "algorithm": {**CONFIG["algorithm"], "group_size": size, "advantage": advantage}}


def ramp(low: float, high: float) -> Callable[[int], float]:
    return lambda i: low + (high - low) * i / (NUM_STEPS - 1)


def late(value: float, before: float) -> Callable[[int], float]:
    """`before` in the first half, then `value`."""
    return lambda i: value if i >= NUM_STEPS // 2 else before


FLAT = {"accuracy__train": lambda i: 0.3 + 0.03 * wobble(i), "reward__accuracy": lambda i: 0.3 + 0.03 * wobble(i)}


def test_a_healthy_run_has_no_finding():
    assert found(rows()) == []


def test_a_run_without_steps_and_one_with_few_have_no_finding():
    assert found([], []) == [] and found(rows()[:3], []) == [] and find_problems([{"step": 1}]) == []


def high_lr() -> tuple:
    train = rows(
        reward__mean=late(0.05, 0.8), policy__entropy=ramp(1.2, 4.0), optim__grad_norm=ramp(0.3, 9.0),
        accuracy__train=late(0.0, 0.4), completion__truncated_frac=late(0.9, 0.05), kl__reference=ramp(0.0, 3.0),
        groups__no_signal_frac=late(0.95, 0.2),
    )  # fmt: skip
    return train, [evaluation(0, 0.3), evaluation(40, 0.0)], None


def collapsed_at_once() -> tuple:
    """As seen with a learning rate 100 times too high: after two steps nothing is rewarded, no update is made."""
    train = rows(
        reward__mean=lambda i: (0.1, 0.4)[i] if i < 2 else 0.0, policy__entropy=None, optim__grad_norm=None,
        accuracy__train=0.0, reward__accuracy=0.0, groups__no_signal_frac=lambda i: float(i >= 2),
        completion__length_tokens_mean=lambda i: (56.0, 19.0)[i] if i < 2 else 8.0,
        optim__is_skipped=lambda i: float(i >= 2), groups__length_reward_correlation=None,
    )  # fmt: skip
    return train, [evaluation(0, 0.0), {**evaluation(40, 0.0), "eval/reward": 0.0}], None


def bad_numbers() -> tuple:
    train = rows()
    for row in train[5:8]:
        row["non_finite"] = ["loss/total"]
        row["loss/total"] = None
    return train, None, None


LONG = {
    "reward__mean": ramp(0.5, 2.0),
    "completion__length_tokens_mean": ramp(100.0, 240.0),
    "completion__truncated_frac": ramp(0.0, 0.8),
    **FLAT,
}

# rule -> cases (train rows, evaluations, config) in which it, and no other rule, must speak
FAULTS = {
    "learning_rate_too_high": [high_lr(), collapsed_at_once()],
    "learning_rate_too_low": [
        (rows(identity__adapter_effect_mean=1e-4, reward__mean=lambda i: 0.75 + 0.03 * wobble(i), **FLAT), None, None)
    ],
    "entropy_collapse": [(rows(policy__entropy=ramp(1.2, 0.01)), None, None)],
    "kl_blow_up": [(rows(kl__reference=0.9), None, None)],
    "reward_without_accuracy": [
        (rows(reward__mean=ramp(0.5, 1.5), accuracy__train=ramp(0.5, 0.2), reward__accuracy=ramp(0.5, 0.2)), None,
         None),
        (rows(), [evaluation(0, 0.5), evaluation(40, 0.3)], None),
    ],
    "pays_for_length": [
        (rows(groups__length_reward_correlation=0.8, **LONG), None, None),
        (rows(groups__length_reward_correlation=None, **LONG), None, None),
    ],
    "rise_from_one_component": [
        (rows(reward__format=ramp(0.2, 0.9), reward__mean=ramp(0.4, 0.75), **FLAT), None, None)
    ],
    "eval_does_not_follow": [(rows(), [evaluation(0, 0.3), evaluation(40, 0.3)], None)],
    "verifier_errors": [
        (rows(reward__error_frac=0.3), None, None),
        (rows(reward__timeout_frac=0.02), None, None),
    ],
    "prompts_too_hard": [(rows(accuracy__train=0.01, reward__accuracy=0.01, groups__no_signal_frac=0.8), None, None)],
    "prompts_too_easy": [(rows(accuracy__train=0.97, reward__accuracy=0.97, groups__no_signal_frac=0.9), None, None)],
    "no_signal": [
        (rows(groups__no_signal_frac=0.7), None, None),
        (rows(groups__no_signal_frac=0.7, accuracy__train=None, reward__accuracy=None), None, None),
    ],
    "truncation": [(rows(completion__truncated_frac=0.4), None, None)],
    "length_runaway": [
        (rows(completion__length_tokens_mean=ramp(60, 200), completion__truncated_frac=ramp(0.0, 0.18), **FLAT,
              reward__mean=lambda i: 0.75 + 0.03 * wobble(i)), None, None)
    ],
    "equal_completions": [(rows(groups__repeated_completion_frac=0.8), None, None)],
    "group_too_small": [(rows(), None, with_group_size(2))],
    "evaluation_too_small": [(rows(), [evaluation(0, 0.3, 30), evaluation(40, 0.5, 30)], None)],
    "non_finite_steps": [bad_numbers()],
    "drift_over_limit": [
        (rows(drift__level=lambda i: 1.0 if i % 4 == 0 else 0.0, drift__logprob_gap_mean=0.12), None, None),
        (rows(drift__level=lambda i: 2.0 if i == 30 else 0.0, drift__ess_frac=0.9), None, None),
    ],
    "gradient_spikes": [(rows(optim__grad_norm=lambda i: 8.0 if i == 20 else 0.3), None, None)],
    "dead_gradient": [(rows(optim__grad_norm=lambda i: 0.0 if i % 2 else 0.3), None, None)],
    "clip_share": [(rows(loss__clip_frac=late(0.4, 0.02)), None, None)],
}  # fmt: skip

# rule -> cases that look like its fault and are none: the rule must not speak (others may)
NEAR_MISSES = {
    "learning_rate_too_high": [
        (rows(optim__grad_norm=ramp(0.1, 0.9), policy__entropy=ramp(1.0, 2.0)), None, None),  # and it learns
        (rows(reward__mean=lambda i: 0.8 + 0.1 * wobble(i)), None, None),
    ],
    "learning_rate_too_low": [
        (rows(identity__adapter_effect_mean=1e-4), None, None),  # the reward rises all the same
        (rows(identity__adapter_effect_mean=None, reward__mean=0.7), None, None),
    ],
    "entropy_collapse": [(rows(policy__entropy=ramp(1.2, 0.4)), None, None), (rows(policy__entropy=0.15), None, None)],
    "kl_blow_up": [(rows(kl__reference=ramp(0.0, 0.2)), None, None)],
    "reward_without_accuracy": [
        (rows(reward__mean=ramp(0.5, 1.5), **FLAT), None, None),
        (rows(), [evaluation(0, 0.5), evaluation(40, 0.48)], None),  # within chance
    ],
    "pays_for_length": [
        (rows(completion__length_tokens_mean=ramp(100, 240)), None, None),  # accuracy rises with length
        (rows(groups__length_reward_correlation=-0.2, **LONG), None, None),
    ],
    "rise_from_one_component": [(rows(reward__format=ramp(0.2, 0.9)), None, None)],
    "eval_does_not_follow": [(rows(), [evaluation(0, 0.3, 30), evaluation(40, 0.3, 30)], None)],  # cannot be told
    "verifier_errors": [(rows(reward__error_frac=lambda i: 0.03 if i == 7 else 0.0), None, None)],
    "prompts_too_hard": [
        (rows(accuracy__train=0.05, groups__no_signal_frac=0.3), None, None),
        (rows(accuracy__train=0.5, groups__no_signal_frac=0.8), None, None),
    ],
    "prompts_too_easy": [(rows(accuracy__train=0.95, groups__no_signal_frac=0.4), None, None)],
    "no_signal": [(rows(groups__no_signal_frac=late(0.3, 0.9)), None, None)],
    "truncation": [(rows(completion__truncated_frac=late(0.02, 0.6)), None, None)],
    "length_runaway": [(rows(completion__length_tokens_mean=ramp(60, 200)), None, None)],
    "equal_completions": [(rows(groups__repeated_completion_frac=0.3), None, None)],
    "group_too_small": [(rows(), None, with_group_size(4)), (rows(), None, with_group_size(1, "reinforce_plus_plus"))],
    "evaluation_too_small": [(rows(), [evaluation(0, 0.3, 200)], None)],
    "non_finite_steps": [([{**row, "non_finite": ["reward_pool/latency_p99_s"]} for row in rows()], None, None)],
    "drift_over_limit": [(rows(drift__level=lambda i: 1.0 if i == 3 else 0.0), None, None)],
    "gradient_spikes": [(rows(optim__grad_norm=lambda i: 1.5 if i == 20 else 0.3), None, None)],
    "dead_gradient": [(rows(optim__grad_norm=None, optim__is_skipped=1.0), None, None)],  # no update was made
    "clip_share": [(rows(loss__clip_frac=late(0.05, 0.5)), None, None)],
}


def cases(table):
    return [
        pytest.param(rule, *case, id=f"{rule}-{i}") for rule, found in table.items() for i, case in enumerate(found)
    ]


def test_every_rule_has_a_true_and_a_false_positive_case():
    assert set(FAULTS) == set(NEAR_MISSES) == set(RULES) and len(RULES) >= 12


@pytest.mark.parametrize(("rule", "train", "evaluations", "config"), cases(FAULTS))
def test_a_planted_fault_triggers_exactly_its_finding(rule, train, evaluations, config):
    assert found(train, evaluations, config) == [rule]


@pytest.mark.parametrize(("rule", "train", "evaluations", "config"), cases(NEAR_MISSES))
def test_what_only_looks_like_the_fault_does_not_trigger_it(rule, train, evaluations, config):
    evaluations = [] if evaluations is None else evaluations

    assert RULES[rule](History(train, evaluations, config or CONFIG)) is None


@pytest.mark.parametrize(("rule", "train", "evaluations", "config"), cases(FAULTS))
def test_a_finding_has_numbers_a_meaning_and_settings_that_exist(rule, train, evaluations, config):
    from rlbench.config.compose import register_schema, schema_keys

    register_schema()
    keys = set(schema_keys())
    (finding,) = find_problems(train, evaluations or [evaluation(0, 0.3), evaluation(40, 0.55)], config or CONFIG)

    assert finding.severity in SEVERITIES and any(c.isdigit() for c in finding.evidence) and finding.meaning
    assert finding.settings
    assert {key for key in finding.settings if not key.startswith("rewards.components.")} <= keys


@pytest.mark.parametrize(("no_signal", "severity"), [(0.55, "warning"), (0.85, "problem")])
def test_hard_prompts_are_a_problem_only_where_hardly_any_group_teaches(no_signal, severity):
    train = rows(accuracy__train=0.05, reward__accuracy=0.05, groups__no_signal_frac=no_signal)

    (finding,) = find_problems(train, [evaluation(0, 0.3), evaluation(40, 0.55)], CONFIG)

    assert (finding.rule, finding.severity) == ("prompts_too_hard", severity)


@pytest.mark.parametrize(("num_steps", "num_late"), [(1, 1), (3, 1), (5, 2), (6, 3), (12, 3), (16, 4), (40, 10)])
def test_what_is_said_of_a_short_run_rests_on_several_steps(num_steps, num_late):
    history = History([{"completion/truncated_frac": float(i)} for i in range(num_steps)])

    assert history.num_late == num_late
    assert history.late("completion/truncated_frac") == num_steps - (num_late + 1) / 2
    assert history.early("completion/truncated_frac") == (num_late - 1) / 2


def test_rules_survive_rows_that_lack_keys_or_hold_nonsense():
    odd = [{"step": i, "phase": "train", "reward/mean": None, "policy/entropy": "high", "groups/no_signal_frac": True,
            "non_finite": []} for i in range(20)]  # fmt: skip

    assert find_problems(odd, [{"step": 1, "eval/accuracy": None}], {"algorithm": None, "rewards": []}) == []


def test_the_worst_comes_first_and_explained_findings_are_left_out():
    train = rows(reward__error_frac=0.5, completion__truncated_frac=0.4)
    findings = find_problems(train, [evaluation(0, 0.3, 30)], CONFIG)

    assert [f.severity for f in findings] == ["problem", "warning", "note"]
    assert set(EXPLAINS) <= set(RULES) and {rule for rules in EXPLAINS.values() for rule in rules} <= set(RULES)
