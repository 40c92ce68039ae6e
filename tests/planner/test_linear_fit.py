import pytest

from rlbench.planner.linear_fit import Line, fit


def test_points_on_a_line_give_the_line():
    assert fit([1, 2, 4], [5, 7, 11]) == Line(fixed=pytest.approx(3), slope=pytest.approx(2))


def test_noise_that_would_need_a_negative_size_is_fitted_through_the_origin():
    assert fit([1, 2], [1, 3]) == Line(fixed=0.0, slope=pytest.approx(7 / 5))


def test_a_falling_line_becomes_flat():
    assert fit([1, 2], [3, 1]) == Line(fixed=2.0, slope=0.0)


def test_a_flat_line_is_never_filled():
    assert Line(1.0, 0.0).inverse(5.0) == float("inf") and Line(1.0, 2.0).inverse(5.0) == 2.0


def test_one_size_is_no_line():
    with pytest.raises(ValueError, match="two different sizes"):
        fit([3, 3], [1, 2])
