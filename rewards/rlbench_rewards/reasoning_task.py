"""Tasks of reasoning-gym, scored by the task's own rule where that rule runs nothing that the model wrote."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase
from rlbench_rewards.extraction import POLICIES, extract_answer, state_answer, without_reasoning

_RUNS_TEXT = re.compile(r"(?<!\w)(?:parse_expr|sympify|simplify|eval|exec)\s*\(")
_MAX_CHARS = 20_000


class ReasoningTask:
    """The task's score of the answer, 0..1.

    reasoning-gym scores some tasks by running the answer through sympy's `parse_expr`, which evaluates Python; those
    tasks are refused at start (countdown has a reward of its own).

    Args:
        task: name of the task, "chain_sum" or "reasoning_gym/chain_sum" as in `data.name`.
        extract: policies in order, see `rlbench_rewards.extraction`; empty: the whole completion is the answer.
        params: of the task, as for the data.
        is_exact: only a full score counts: everything else is 0.0.

    Raises:
        ValueError: reasoning-gym is not installed, has no such task, or its rule runs the answer.
    """

    needs_right_answer = True

    def __init__(
        self,
        task: str,
        extract: Sequence[str] = ("answer_tag", "boxed", "hash"),
        params: Mapping[str, Any] | None = None,
        is_exact: bool = True,
    ) -> None:
        unknown = [policy for policy in extract if policy not in POLICIES]
        if unknown:
            raise ValueError(f"extract is {list(extract)}, expected some of: {', '.join(POLICIES)}")
        self._dataset = _dataset(task.removeprefix("reasoning_gym/"), params or {})
        self._extract, self._is_exact = tuple(extract), is_exact
        self.required_columns = ("answer", "metadata")

    def __call__(self, sample: RewardSample) -> RewardOutput:
        text = without_reasoning(sample.completion)
        answer = text if text is None or not self._extract else extract_answer(text, self._extract).answer
        if answer is None or not answer.strip() or len(answer) > _MAX_CHARS:
            return RewardOutput(value=0.0, details={"reason": "no answer, or one that is too long"})
        score = float(self._dataset.score_answer(answer.strip(), self._entry(sample)))
        value = (1.0 if score >= 1.0 else 0.0) if self._is_exact else score
        return RewardOutput(value=value, details={"answer": answer.strip()[:200], "score": score})

    def gold_completion(self, sample: RewardSample) -> str:
        answer = str(sample.columns["answer"])
        return state_answer(answer, self._extract[0]) if self._extract else answer

    def unit_cases(self) -> list[UnitCase]:
        row = self._dataset[0]
        gold = self.gold_completion(RewardSample(prompt="", completion="", columns=row))
        return [
            UnitCase(completion=gold, expected=1.0, columns=row),
            UnitCase(completion="", expected=0.0, columns=row),
        ]

    def _entry(self, sample: RewardSample) -> dict[str, Any]:
        row = sample.columns
        try:
            metadata = json.loads(row["metadata"]) if isinstance(row["metadata"], str) else row["metadata"]
        except (KeyError, ValueError) as error:
            raise RewardError(f"the row's column 'metadata' holds no JSON object ({error})") from error
        return {"question": row.get("question", ""), "answer": str(row["answer"]), "metadata": metadata}


def _dataset(task: str, params: Mapping[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError("tasks need the package reasoning-gym; expected: pip install reasoning-gym") from error
    if task not in DATASETS:
        raise ValueError(f"task is {task!r}, expected one of reasoning-gym's: {', '.join(sorted(DATASETS))}")
    module = inspect.getmodule(DATASETS[task][0].score_answer)
    if module is None or _RUNS_TEXT.search(inspect.getsource(module)):
        raise ValueError(
            f"task is {task!r}, whose rule in reasoning-gym may run the answer as code; expected another task, or for "
            "countdown rewards=countdown"
        )
    return reasoning_gym.create_dataset(task, size=1, seed=0, **params)
