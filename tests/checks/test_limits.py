"""Limits come from measurements: committed ones, with a margin, each pair its own."""

import json
from pathlib import Path

import pytest

from rlbench.checks.limits import (
    FLOORS,
    MARGIN,
    MEASURED,
    Gap,
    Pair,
    derive_drift_limits,
    honest_gap,
    identity_limit,
)
from rlbench.config.schema import ChecksConfig, EngineConfig, HardwareConfig, ModelConfig, RunConfig

PLAIN = (("bfloat16", "none", "auto"), ("bfloat16", "nf4", "auto"))
NAMES = ("mean", "p99", "max")
RESULTS = Path(__file__).parents[2] / "scripts" / "results" / "identity_cpu.json"


def config(engine="hf", profile="cpu", dtype="bfloat16", **checks) -> RunConfig:
    return RunConfig(
        hardware=HardwareConfig(profile=profile),
        model=ModelConfig(dtype=dtype),
        engine=EngineConfig(kind=engine),
        checks=ChecksConfig(**checks),
    )


@pytest.mark.parametrize("key", [key for key in MEASURED if key[1] == "cpu" and key[3:] == ("none", "auto")])
def test_the_table_holds_what_the_committed_measurement_says(key):
    engine, _, dtype, _, _ = key
    cases = [f"{dtype}, {case}" for case in ("as sampled", "scored", "scored, base")]
    rows = json.loads(RESULTS.read_text())["rows"]
    rows = [row for row in rows if row["impl"] == engine and row["case"] in cases]

    for name in NAMES:
        found = max(row["value"] for row in rows if row["metric"] == name)
        assert getattr(MEASURED[key], name) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    ("quantization", "kv_cache_dtype", "file", "case", "words"),
    [
        ("fp8", "auto", "fp8_cpu", "trainer does not", "with an FP8 base"),
        ("none", "fp8", "fp8_kv_cpu", "FP8 keys and values", "with FP8 keys and values"),
        ("fp8", "fp8", "fp8_kv_cpu", "FP8 keys, values and base", "with an FP8 base and FP8 keys and values"),
    ],
)
def test_what_vllm_rounds_to_fp8_has_wider_limits_of_its_own(quantization, kv_cache_dtype, file, case, words):
    rows = json.loads((RESULTS.parent / f"{file}.json").read_text())["rows"]
    measured = {row["metric"]: row["value"] for row in rows if row["case"] == case}

    gap, source = honest_gap(Pair("vllm", "cpu", "bfloat16", quantization, kv_cache_dtype))

    assert f"{words};" in f"{source};" and "measured for engine=vllm on cpu" in source
    for name in NAMES:
        assert getattr(gap, name) == pytest.approx(measured[name], rel=0.1)


@pytest.mark.parametrize(
    ("quantization", "kv_cache_dtype", "case"),
    [("fp8", "auto", "smollm2-135m, fp8"), ("none", "fp8", "smollm2-135m, none, fp8 keys and values")],
)
def test_of_what_a_gpu_rounds_to_fp8_the_table_holds_what_was_measured_there(quantization, kv_cache_dtype, case):
    rows = json.loads((RESULTS.parent / "fp8_h200.json").read_text())["rows"]

    gap, source = honest_gap(Pair("vllm", "cuda", "bfloat16", quantization, kv_cache_dtype))

    assert "measured for engine=vllm on cuda" in source
    for name in NAMES:
        found = max(r["value"] for r in rows if r["case"] == case and r["metric"].endswith(f", {name}"))
        assert getattr(gap, name) == pytest.approx(found, rel=0.02)


def test_a_pair_that_no_gpu_has_been_measured_with_has_the_widest_of_a_cpu_and_says_why():
    gap, source = honest_gap(Pair("vllm", "cuda", "bfloat16", "fp8", "fp8"))

    assert gap == MEASURED[Pair("vllm", "cpu", "bfloat16", "fp8", "fp8")]
    assert "no measurement of its own" in source and "a GPU rounds otherwise" in source


def test_only_vllms_roundings_widen_a_limit():
    hf = honest_gap(Pair("hf", "cuda", "bfloat16", "fp8"))[0]
    assert hf.mean < MEASURED[Pair("vllm", "cpu", "bfloat16", "fp8")].mean / 2


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", "nf4"), ("float32", "none")])
def test_fp8_keys_and_values_beside_another_base_or_dtype_get_the_measured_ones_and_say_so(dtype, quantization):
    gap, source = honest_gap(Pair("vllm", "cpu", dtype, quantization, "fp8"))

    assert gap == MEASURED[Pair("vllm", "cpu", "bfloat16", "none", "fp8")]
    assert source.startswith("the widest measured in bfloat16 with FP8 keys and values; engine=vllm on cpu has no")


def test_a_run_with_fp8_keys_and_values_has_their_limit():
    run = config(engine="vllm")
    before = identity_limit(run)
    run.engine.kv_cache_dtype = "fp8"

    assert identity_limit(run).mean == MARGIN * MEASURED[Pair("vllm", "cpu", "bfloat16", "none", "fp8")].mean
    assert identity_limit(run).mean > 2 * before.mean
    assert all("FP8 keys and values" in d.reason for d in derive_drift_limits(run))


def test_a_limit_is_the_measurement_times_the_margin_but_never_below_the_floor():
    measured = MEASURED[Pair("hf", "cpu", "bfloat16", "none")]

    limit = identity_limit(config())

    assert limit.mean == max(MARGIN * measured.mean, FLOORS["bfloat16"].mean)
    assert limit.max == max(MARGIN * measured.max, FLOORS["bfloat16"].max)
    assert identity_limit(config(dtype="float32")).mean == FLOORS["float32"].mean
    assert identity_limit(config(identity_limit_scale=2.0)).p99 == pytest.approx(2 * limit.p99)


def test_a_pair_that_was_not_measured_gets_the_widest_of_its_dtype_and_says_so():
    gap, source = honest_gap(Pair("hf", "cuda", "bfloat16", "none"))

    assert gap == Gap(*(max(getattr(g, n) for k, g in MEASURED.items() if k[2:] in PLAIN) for n in NAMES))
    assert "no measurement of its own" in source


def test_drift_limits_are_derived_with_a_reason_and_a_users_value_wins():
    run = config(drift_warn_nats=0.7)

    (derived,) = derive_drift_limits(run)

    assert (derived.key, derived.value) == ("checks.drift_stop_nats", run.checks.drift_stop_nats)
    assert "mean gap of an honest pair" in derived.reason and "engine=hf on cpu in bfloat16" in derived.reason
    assert run.checks.drift_warn_nats == 0.7
