"""What a reward may return."""

import math

import numpy as np
import pytest

from rlbench_rewards.contract import RewardError, RewardOutput, checked_value


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(3), 3, 0.5])
def test_numbers_of_numpy_are_numbers(value):
    checked = checked_value(RewardOutput(value=value, details={"a": 1})).value

    assert checked == value and type(checked) in (int, float)


@pytest.mark.parametrize("value", [np.bool_(True), True, "1", 1 + 2j, np.array([1.0]), np.float32(math.nan), math.inf])
def test_what_is_no_finite_number_is_a_broken_reward(value):
    with pytest.raises(RewardError, match="expected a (finite )?number"):
        checked_value(RewardOutput(value=value))
