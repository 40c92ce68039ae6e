"""A few cases in which every two values of two different factors meet."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Each case starts from a pair not met yet and takes of every other factor the value with most new pairs."""
    names = list(factors)
    missing = {
        (a, i, b, j) for a, b in combinations(names, 2) for i in range(len(factors[a])) for j in range(len(factors[b]))
    }
    cases = []
    while missing:
        a, i, b, j = min(missing, key=lambda pair: (names.index(pair[0]), pair[1], names.index(pair[2]), pair[3]))
        case = {a: i, b: j}
        for name in names:
            if name not in case:
                gains = [len(_pairs({**case, name: v}, names) & missing) for v in range(len(factors[name]))]
                case[name] = gains.index(max(gains))
        missing -= _pairs(case, names)
        cases.append({name: factors[name][case[name]] for name in names})
    return cases


def _pairs(case: Mapping[str, int], names: Sequence[str]) -> set[tuple[str, int, str, int]]:
    return {(a, case[a], b, case[b]) for a, b in combinations(names, 2) if a in case and b in case}
