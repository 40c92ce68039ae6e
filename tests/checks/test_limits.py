"""Limits come from measurements: committed ones, with a margin, each pair its own."""

import json
from pathlib import Path

import pytest

from rlbench.checks.limits import (
    FLOORS,
    MARGIN,
    MEASURED,
    Gap,
    derive_drift_limits,
    honest_gap,
    identity_limit,
)
from rlbench.config.schema import ChecksConfig, EngineConfig, HardwareConfig, ModelConfig, RunConfig

NAMES = ("mean", "p99", "max")
RESULTS = Path(__file__).parents[2] / "scripts" / "results" / "identity_cpu.json"


def config(engine="hf", profile="cpu", dtype="bfloat16", **checks) -> RunConfig:
    return RunConfig(
        hardware=HardwareConfig(profile=profile),
        model=ModelConfig(dtype=dtype),
        engine=EngineConfig(kind=engine),
        checks=ChecksConfig(**checks),
    )


@pytest.mark.parametrize("key", [key for key in MEASURED if key[1] == "cpu" and key[3] == "none"])
def test_the_table_holds_what_the_committed_measurement_says(key):
    engine, _, dtype, _ = key
    cases = [f"{dtype}, {case}" for case in ("as sampled", "scored", "scored, base")]
    rows = json.loads(RESULTS.read_text())["rows"]
    rows = [row for row in rows if row["impl"] == engine and row["case"] in cases]

    for name in NAMES:
        found = max(row["value"] for row in rows if row["metric"] == name)
        assert getattr(MEASURED[key], name) == pytest.approx(found, rel=0.1)


def test_an_fp8_base_in_vllm_has_a_wider_limit_of_its_own_also_on_a_gpu_and_nobody_else_has():
    rows = json.loads((RESULTS.parent / "fp8_cpu.json").read_text())["rows"]
    measured = {row["metric"]: row["value"] for row in rows if row["case"] == "trainer does not"}

    for device, words in (("cpu", "measured for engine=vllm on cpu"), ("cuda", "bfloat16 on an FP8 base")):
        gap, source = honest_gap("vllm", device, "bfloat16", "fp8")
        assert words in source
        for name in NAMES:
            assert getattr(gap, name) == pytest.approx(measured[name], rel=0.1)
    assert honest_gap("hf", "cuda", "bfloat16", "fp8")[0].mean < measured["mean"] / 2


def test_a_limit_is_the_measurement_times_the_margin_but_never_below_the_floor():
    measured = MEASURED["hf", "cpu", "bfloat16", "none"]

    limit = identity_limit(config())

    assert limit.mean == max(MARGIN * measured.mean, FLOORS["bfloat16"].mean)
    assert limit.max == max(MARGIN * measured.max, FLOORS["bfloat16"].max)
    assert identity_limit(config(dtype="float32")).mean == FLOORS["float32"].mean
    assert identity_limit(config(identity_limit_scale=2.0)).p99 == pytest.approx(2 * limit.p99)


def test_a_pair_that_was_not_measured_gets_the_widest_of_its_dtype_and_says_so():
    gap, source = honest_gap("hf", "cuda", "bfloat16", "none")

    assert gap == Gap(
        *(
            max(getattr(g, n) for k, g in MEASURED.items() if k[2:] in (("bfloat16", "none"), ("bfloat16", "nf4")))
            for n in NAMES
        )
    )
    assert "no measurement of its own" in source


def test_drift_limits_are_derived_with_a_reason_and_a_users_value_wins():
    run = config(drift_warn_nats=0.7)

    (derived,) = derive_drift_limits(run)

    assert (derived.key, derived.value) == ("checks.drift_stop_nats", run.checks.drift_stop_nats)
    assert "mean gap of an honest pair" in derived.reason and "engine=hf on cpu in bfloat16" in derived.reason
    assert run.checks.drift_warn_nats == 0.7
