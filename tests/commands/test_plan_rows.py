"""Rows of the plan whose reason is worked out for them."""

from types import SimpleNamespace

import pytest

from rlbench.commands.plan import lr_row
from rlbench.config.derive import derive
from rlbench.config.schema import OptimConfig, RunConfig, TrainingConfig
from tests.config.test_algorithm_config import FACTS


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
