"""Counts are kept exactly, and equal ones are one kind, however often they change."""

import json
import math
import random

from rlbench.data.answer_counts import AnswerCounts

NAMES = [f"train/{i}" for i in range(20)]


def of_kind(counts: AnswerCounts, name: str) -> tuple[float, float]:
    row = counts.kind_of[NAMES.index(name)]
    right, wrong = counts.kinds()
    return right[row], wrong[row]


def changed(times: int, memory: float = 0.9) -> AnswerCounts:
    counts, drawing = AnswerCounts(NAMES), random.Random(0)
    for _ in range(times):
        name, num_right = drawing.choice(NAMES[:15]), drawing.randint(0, 8)
        right, wrong = counts[name]
        counts.set(name, (memory * right + num_right, memory * wrong + 8 - num_right))
    return counts


def test_prompts_of_equal_counts_are_of_one_kind_and_those_without_answers_too():
    counts = AnswerCounts(NAMES)
    counts.set("train/3", (1.0, 3.0))
    counts.set("train/7", (1.0, 3.0))
    counts.set("train/8", (3.0, 1.0))

    assert len(counts) == 3 and counts.kinds()[0].tolist() == [0.0, 1.0, 3.0]
    assert [row for row in counts.kind_of.tolist() if row] == [1, 1, 2]


def test_each_prompt_has_the_counts_of_its_kind_and_kinds_that_went_out_of_use_are_dropped():
    counts = changed(500)

    assert len(counts) == 15 and len(set(counts.state().values())) > 10
    assert all(of_kind(counts, name) == counts[name] for name in NAMES)
    assert len(counts.kinds()[0]) <= 2 * len(NAMES) + 2


def test_totals_are_the_sums_rounded_once_whatever_came_before():
    counts = changed(500)
    again = AnswerCounts(NAMES)
    again.restore(json.loads(json.dumps(counts.state())))

    expected = tuple(math.fsum(column) for column in zip(*counts.state().values(), strict=True))
    assert counts.totals() == again.totals() == expected
    assert again.state() == counts.state() and list(again.state()) == list(counts.state())
    assert all(of_kind(again, name) == counts[name] for name in NAMES)


def test_prompts_that_are_not_there_any_more_are_forgotten():
    counts = AnswerCounts(NAMES)
    counts.restore({"train/1": [1.0, 0.0], "train/99": [5.0, 5.0]})

    assert counts.state() == {"train/1": (1.0, 0.0)} and counts.totals() == (1.0, 0.0)
