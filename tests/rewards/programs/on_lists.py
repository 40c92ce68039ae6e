# ruff: noqa: B905, UP006, UP035, UP045
"""Tasks of HumanEval's form on lists: a function, and the check that goes with it; see `rows.py`."""

from typing import Any, List, Optional, Tuple


def rotated(items: List[int], by: int) -> List[int]:
    """The items moved to the right by as many places, those at the end to the front."""
    if not items:
        return []
    by %= len(items)
    return items[-by:] + items[:-by]


def check_rotated(candidate):
    assert candidate([1, 2, 3, 4], 1) == [4, 1, 2, 3]
    assert candidate([], 3) == [] and candidate([1, 2], 0) == [1, 2] and candidate([1, 2, 3], 5) == [2, 3, 1]


def chunks(items: List[int], size: int) -> List[List[int]]:
    """The items in lists of that size, the last one shorter where they do not fit."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def check_chunks(candidate):
    assert candidate([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert candidate([], 2) == [] and candidate([1], 3) == [[1]]


def runner_up(numbers: List[int]) -> Optional[int]:
    """The second largest of the different numbers; None without one."""
    different = sorted(set(numbers))
    return different[-2] if len(different) > 1 else None


def check_runner_up(candidate):
    assert candidate([3, 9, 9, 5]) == 5
    assert candidate([4, 4]) is None and candidate([]) is None
    assert candidate([1, 2]) == 1


def merged(a: List[int], b: List[int]) -> List[int]:
    """Two sorted lists as one sorted list, in one pass."""
    result, i, j = [], 0, 0
    for _ in range(len(a) + len(b)):
        if j == len(b) or (i < len(a) and a[i] <= b[j]):
            result.append(a[i])
            i += 1
        else:
            result.append(b[j])
            j += 1
    return result


def check_merged(candidate):
    import random

    rng = random.Random(3)
    assert candidate([1, 4], [2, 3]) == [1, 2, 3, 4]
    assert candidate([], [5]) == [5] and candidate([5], []) == [5] and candidate([], []) == []
    for _ in range(30):
        a = sorted(rng.randint(0, 20) for _ in range(rng.randint(0, 6)))
        b = sorted(rng.randint(0, 20) for _ in range(rng.randint(0, 6)))
        assert candidate(a, b) == sorted(a + b)


def highest_so_far(numbers: List[int]) -> List[int]:
    """For each place the largest number up to it."""
    highest = []
    for number in numbers:
        highest.append(number if not highest else max(number, highest[-1]))
    return highest


def check_highest_so_far(candidate):
    assert candidate([1, 3, 2, 5, 4]) == [1, 3, 3, 5, 5]
    assert candidate([]) == [] and candidate([-2, -3]) == [-2, -2]


def peaks(numbers: List[int]) -> List[int]:
    """Places of the numbers that are larger than both neighbours."""
    inner = range(1, len(numbers) - 1)
    return [i for i in inner if numbers[i] > numbers[i - 1] and numbers[i] > numbers[i + 1]]


def check_peaks(candidate):
    assert candidate([1, 3, 2, 4, 1]) == [1, 3]
    assert candidate([1, 2, 2, 1]) == [] and candidate([3, 1, 2]) == [] and candidate([]) == []
    assert candidate([1, 2, 2, 3, 0]) == [3] and candidate([0, 5, 4, 4, 6, 6, 1]) == [1]


def transposed(matrix: List[List[int]]) -> List[List[int]]:
    """Rows as columns."""
    return [list(row) for row in zip(*matrix)]


def check_transposed(candidate):
    assert candidate([[1, 2, 3], [4, 5, 6]]) == [[1, 4], [2, 5], [3, 6]]
    assert candidate([]) == []


def diagonals(matrix: List[List[int]]) -> Tuple[int, int]:
    """The sums of both diagonals of a square matrix, the one from the upper left first."""
    size = len(matrix)
    return sum(matrix[i][i] for i in range(size)), sum(matrix[i][size - 1 - i] for i in range(size))


def check_diagonals(candidate):
    assert candidate([[1, 2], [3, 4]]) == (5, 5)
    assert candidate([[1, 2, 3], [4, 5, 6], [7, 8, 10]]) == (16, 15)
    assert tuple(candidate([])) == tuple([0, 0])


def united(ranges: List[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """Ranges that touch or overlap as one, sorted."""
    result = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1]:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def check_united(candidate):
    assert candidate([(5, 7), (1, 3), (2, 4)]) == [(1, 4), (5, 7)]
    assert candidate([]) == [] and candidate([(1, 2), (2, 3)]) == [(1, 3)]
    assert candidate([(1, 9), (2, 3), (4, 5)]) == [(1, 9)]


def without_repeats(items: List[Any]) -> List[Any]:
    """Each item once, in the order of its first place."""
    seen, result = set(), []
    for item in items:
        if item not in seen:
            seen.add(item)
            result.append(item)
    return result


def check_without_repeats(candidate):
    assert candidate([3, 1, 3, 2, 1]) == [3, 1, 2]
    assert candidate([]) == [] and candidate(["a", None, "a", None]) == ["a", None]


def split_at(numbers: List[float], pivot: float) -> Tuple[List[float], List[float], List[float]]:
    """The numbers below, equal to and above the pivot, each in their order."""
    below = [x for x in numbers if x < pivot]
    above = [x for x in numbers if x > pivot]
    return below, [pivot] * (len(numbers) - len(below) - len(above)), above


def check_split_at(candidate):
    assert candidate([3, 1, 2, 3, 5], 3) == ([1, 2], [3, 3], [5])
    assert candidate([], 1) == ([], [], []) and candidate([0.5, 1.5], 1) == ([0.5], [], [1.5])


def place_of(numbers: List[int], wanted: int) -> int:
    """The place of a number in a sorted list, -1 if it is not there, by halving."""
    low, high = 0, len(numbers) - 1
    for _ in range(64):
        if low > high:
            break
        middle = (low + high) // 2
        if numbers[middle] == wanted:
            return middle
        if numbers[middle] < wanted:
            low = middle + 1
        else:
            high = middle - 1
    return -1


def check_place_of(candidate):
    numbers = list(range(0, 60, 3))
    for number in range(-1, 61):
        assert candidate(numbers, number) == (numbers.index(number) if number in numbers else -1)
    assert candidate([], 1) == -1


def best_sum(numbers: List[int]) -> int:
    """The largest sum of neighbouring numbers, at least one of them."""
    best = here = numbers[0]
    for number in numbers[1:]:
        here = max(number, here + number)
        best = max(best, here)
    return best


def check_best_sum(candidate):
    assert candidate([-2, 1, -3, 4, -1, 2, 1, -5, 4]) == 6
    assert candidate([-3, -1, -2]) == -1 and candidate([5]) == 5 and candidate([2, -1, 2]) == 3


def pairs_with_sum(numbers: List[int], total: int) -> int:
    """How many pairs of places hold two numbers of that sum."""
    count = 0
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            if numbers[i] + numbers[j] == total:
                count += 1
    return count


def check_pairs_with_sum(candidate):
    assert candidate([1, 5, 3, 3], 6) == 2
    assert candidate([2, 2, 2], 4) == 3 and candidate([], 0) == 0 and candidate([4], 8) == 0


def flattened(nested: List[Any]) -> List[Any]:
    """All items of lists within lists, in order."""
    result = []
    for item in nested:
        if isinstance(item, list):
            result += flattened(item)
        else:
            result.append(item)
    return result


def check_flattened(candidate):
    assert candidate([1, [2, [3, []]], "ab"]) == [1, 2, 3, "ab"]
    assert candidate([]) == [] and candidate([[[7]]]) == [7]
