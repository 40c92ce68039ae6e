import math

from rlbench.tracking.sparkline import sparkline


def test_the_lowest_and_highest_values_get_the_lowest_and_highest_marks():
    assert sparkline([0, 1, 2, 7], 10) == "▁▂▃█"


def test_gaps_and_nan_leave_a_hole_and_do_not_count():
    assert sparkline([0, None, math.nan, 7], 10) == "▁  █" and sparkline([None], 5) == " "


def test_more_values_than_characters_become_means_of_neighbours():
    assert sparkline([0, 2, 6, 8], 2, "ab", low=0, high=8) == "ab"
    line = sparkline(list(range(1000)), 37)
    assert len(line) == 37 and list(line) == sorted(line)


def test_a_constant_is_drawn_in_the_middle():
    assert sparkline([3, 3], 5) == "▅▅"


def test_values_outside_given_bounds_get_the_outermost_marks():
    assert sparkline([-5, 50], 5, low=0, high=10) == "▁█"
