"""Components become a reward: hand-computed numbers."""

import pytest

from rlbench_rewards.composition import Scored, Term, compose


def value(number: float) -> Scored:
    return Scored("value", number)


def one(parts: dict, terms: dict, **options):
    return compose([parts], terms, **options)[0]


TERMS = {"accuracy": Term(weight=2.0), "length": Term(weight=-0.5)}


def test_a_sum_and_a_product_of_weighted_values():
    parts = {"accuracy": value(1.0), "length": value(3.0)}

    assert one(parts, TERMS) == 0.5
    assert one(parts, TERMS, way="product") == -3.0


def test_a_closed_gate_takes_everything_and_an_open_one_nothing():
    terms = {"format": Term(weight=0.0, gate_min=1.0), "accuracy": Term()}

    assert one({"format": value(0.5), "accuracy": value(1.0)}, terms) == 0.0
    assert one({"format": value(0.5), "accuracy": value(1.0)}, terms, gated_value=-1.0) == -1.0
    assert one({"format": value(1.0), "accuracy": value(1.0)}, terms) == 1.0


def test_each_component_is_normalised_within_the_group():
    terms = {"big": Term(), "small": Term()}
    group = [{"big": value(b), "small": value(s)} for b, s in ((0.0, 0.0), (100.0, 0.0), (0.0, 0.01), (100.0, 0.01))]
    rewards = compose(group, terms, way="normalised_sum")

    big, small = 50 / (50 + 1e-4), 0.005 / (0.005 + 1e-4)
    assert rewards == pytest.approx([-big - small, big - small, -big + small, big + small])
    assert sum(r for r in rewards if r) == pytest.approx(0.0, abs=1e-12)


def test_a_broken_component_leaves_no_reward_unless_it_is_only_watched():
    broken = {"accuracy": Scored("timeout", None), "length": value(1.0)}

    assert one(broken, TERMS) is None
    assert one(broken, {"accuracy": Term(weight=0.0), "length": Term()}) == 1.0
    assert one(broken, {"accuracy": Term(weight=0.0, gate_min=0.5), "length": Term()}) is None


def test_a_component_that_does_not_apply_is_left_out():
    skipped = Scored("skipped", None)

    assert one({"accuracy": skipped, "length": value(2.0)}, TERMS) == -1.0
    assert one({"accuracy": skipped, "length": value(2.0)}, TERMS, way="product") == -1.0
    assert one({"accuracy": skipped, "length": skipped}, TERMS) is None


def test_a_group_with_broken_rollouts_is_normalised_over_the_others():
    group = [{"a": value(0.0)}, {"a": Scored("error", None)}, {"a": value(1.0)}]
    rewards = compose(group, {"a": Term()}, way="normalised_sum")

    assert rewards[1] is None
    assert rewards[0] == pytest.approx(-0.5 / 0.5001) and rewards[2] == pytest.approx(0.5 / 0.5001)
