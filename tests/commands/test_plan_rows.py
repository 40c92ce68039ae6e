"""Rows of the plan whose reason is worked out for them."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlbench.commands.plan import lr_row
from rlbench.commands.plan_memory import _rows
from rlbench.commands.plan_offline import _held_out_row
from rlbench.config.derive import derive
from rlbench.config.schema import OptimConfig, RunConfig, TrainingConfig
from rlbench.data.preferences import PreferenceRow
from rlbench.data.supervised import given_sample
from rlbench.models.moments import MomentBytes
from tests.config.test_algorithm_config import FACTS
from tests.planner.test_memory_plan import made


@pytest.mark.parametrize(
    ("parameters", "lr", "value", "reason"),
    [
        ("full", None, "2e-05", "derived: training.parameters is full: the default of TRL's SFTConfig"),
        ("full", 2e-3, "0.002", "100 times 2e-05, which optim.lr=null would take"),
        ("full", 3e-5, "3e-05", ""),
        ("lora", None, "0.0001", "derived: of an adapter, in every stage"),
        ("lora", 2e-3, "0.002", ""),
    ],
)
def test_the_learning_rate_says_where_it_comes_from_or_that_it_is_unusual(parameters, lr, value, reason):
    training, optim = TrainingConfig(parameters=parameters), OptimConfig(lr=lr)
    config = RunConfig(stage="sft", training=training, optim=optim)
    row = lr_row(SimpleNamespace(config=config, derived=derive(config, FACTS)))  # type: ignore[arg-type]

    assert (row.name, row.value, row.reason[: len(reason)], bool(row.reason)) == (
        "optim.lr",
        value,
        reason,
        bool(reason),
    )


@pytest.mark.parametrize("paged", [0, 2**29])
def test_paged_moments_are_a_row_of_their_own_above_the_peak(paged):
    plan = made(moments=MomentBytes(device=2**24, paged=paged))
    probes: Any = SimpleNamespace(microbatch_tokens=1024, update=[1, 2])
    rows = {row.name: row for row in _rows(plan, probes, RunConfig(), "device memory")}

    assert rows["optimizer state"].value == "0.02" and rows["peak"].value == "3.00"
    if paged:
        row = rows["optimizer state, paged"]
        assert row.value == "0.50" and row.reason.startswith("beside the peak: the driver moves it to host memory")
    assert ("optimizer state, paged" in rows) == bool(paged)


def test_held_out_rows_that_are_trained_on_too_are_counted():
    samples = [given_sample(f"train/{i}", ids, [False, True, True]) for i, ids in enumerate([(2, 3, 4), (2, 3, 5)])]
    assert _held_out_row(samples, [samples[1]]).reason.startswith("1 of them are training rows too")
    assert (_held_out_row(samples[:1], samples[1:]).value, _held_out_row(samples[:1], samples[1:]).reason) == ("1", "")

    def pair(chosen: int, rejected: int, is_desirable: bool | None = None) -> PreferenceRow:
        return PreferenceRow(
            row_id=str(chosen), prompt_token_ids=(2,), completions=((chosen,), (rejected,)), is_desirable=is_desirable
        )

    assert _held_out_row([pair(3, 4)], [pair(3, 5)]).reason == ""
    assert _held_out_row([pair(3, 4)], [pair(3, 4)]).reason.startswith("1 of")
    assert _held_out_row([pair(3, 4, True)], [pair(3, 5, True)]).reason.startswith("1 of")  # whatever its mismatch is
