from pytest import approx

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.schema import RunConfig, SamplingConfig
from rlbench.models.moments import MomentBytes
from rlbench.planner.memory_plan import GIB, UNBOUNDED, make_plan
from rlbench.planner.probes import Probe, Probes


def made(**changes):
    """1 GiB is held; an update takes 1 GiB + 1 MiB a token; 8 rows write 1 KiB of cache a token each."""
    values = {
        "base_bytes": GIB // 2,
        "adapter_bytes": GIB // 16,
        "kv_bytes_per_token": 1024,
        "step_tokens": 2048,
        "microbatch_tokens": 1024,
        "num_microbatches": 2,
        "generation": [Probe(size=8, seconds=1.0, peak_bytes=GIB), Probe(size=24, seconds=2.0, peak_bytes=GIB)],
        "warm_bytes": GIB,
        "update": [
            Probe(size=256, seconds=1.0, peak_bytes=2 * GIB + GIB // 4),
            Probe(size=512, seconds=2.0, peak_bytes=2 * GIB + GIB // 2),
        ],
        "head_bytes": GIB // 8,
        "num_rows": 8,
        "moments": MomentBytes(device=GIB // 8),
    }
    config = RunConfig(
        algorithm=AlgorithmConfig(prompts_per_step=2, group_size=8), sampling=SamplingConfig(max_tokens=56)
    )
    return make_plan(Probes(**{**values, **changes}), config, 10 * GIB, longest_prompt=100, context=2000)


def test_the_update_is_extrapolated_to_the_runs_microbatch():
    assert made().update_peak_gib == approx(1 + 1 + 1) and made().peak_gib == approx(3)


def test_scoring_for_the_identity_check_may_be_the_highest_moment_while_the_engine_is_awake():
    plan = made(scoring_bytes=4 * GIB)

    assert plan.generation_peak_gib == approx(4) and plan.peak_gib == approx(4)
    assert sum(plan.memory_gib.values()) == approx(plan.peak_gib)


def test_the_parts_add_up_to_the_peak():
    for plan in (made(), made(warm_bytes=0, update=[Probe(size=s, seconds=1, peak_bytes=s) for s in (1, 2)])):
        assert sum(plan.memory_gib.values()) == approx(plan.peak_gib)


def test_a_cache_of_fixed_size_limits_no_completion_and_is_a_part_of_generation():
    full = [Probe(size=size, seconds=1.0, peak_bytes=5 * GIB) for size in (8, 24)]
    plan = made(kv_bytes_per_token=0, engine_cache_bytes=GIB // 4, generation=full)

    assert plan.max_completion_tokens == 2000 - 100
    assert plan.memory_gib["KV cache"] == approx(1 / 4)
    assert plan.generation_peak_gib == approx(5) and sum(plan.memory_gib.values()) == approx(plan.peak_gib)


def test_generation_adds_the_cache_of_the_tokens_that_were_not_probed():
    assert made().generation_peak_gib == approx(1 + 8 * 32 * 1024 / GIB)


def test_times_are_those_of_all_waves_and_microbatches():
    assert made().time_s == {"generation": approx(2 * (0.5 + 56 / 16)), "update": approx(2 * 1024 / 256)}


def test_the_largest_microbatch_fills_nine_tenths_of_the_limit():
    assert made().max_microbatch_tokens == (9 - 1 - 1) * 1024


def test_the_longest_completion_fits_context_microbatch_and_cache():
    assert made().max_completion_tokens == 2000 - 100
    assert made(kv_bytes_per_token=0).max_completion_tokens == 1900  # a cache that is held already
    assert made(kv_bytes_per_token=GIB // 100).max_completion_tokens < 1900
    full = [Probe(size=s, seconds=1, peak_bytes=10 * GIB + s * GIB // 1024) for s in (256, 512)]
    assert made(warm_bytes=9 * GIB, update=full).max_completion_tokens == 0


def test_where_no_size_costs_memory_no_limit_is_claimed():
    flat = [Probe(size=s, seconds=1, peak_bytes=GIB) for s in (256, 512)]

    assert made(update=flat).max_microbatch_tokens == UNBOUNDED


def test_a_plan_over_the_limit_does_not_fit():
    assert made().fits and not made(microbatch_tokens=9000).fits


def test_half_a_microbatch_saves_its_share():
    knob = made().knobs[0]

    assert knob.setting == "training.tokens_per_microbatch=512" and knob.saves_gib == approx(0.5)


def test_of_all_weights_masters_and_a_frozen_copy_are_parts():
    beside = {"master weights": GIB // 4, "frozen copy": GIB // 8}
    plan = made(adapter_bytes=GIB // 4, beside_weights=beside, moments=MomentBytes(device=GIB // 2))

    assert sum(plan.memory_gib.values()) == approx(plan.peak_gib)
    assert not {"adapter", "engine's adapter"} & plan.memory_gib.keys()
    expected = {"master weights": 0.25, "frozen copy": 0.125, "optimizer state": 0.5, "gradients": 0.25}
    assert {name: plan.memory_gib[name] for name in expected} == approx(expected)
    assert plan.knobs[-1].setting == "training.parameters=lora"
    assert plan.knobs[-1].saves_gib == approx(3 * 0.25 + 0.375)


def test_paged_moments_are_beside_the_peak():
    plan = made(moments=MomentBytes(device=GIB // 64, paged=GIB // 2))

    assert (plan.memory_gib["optimizer state"], plan.paged_gib) == (1 / 64, 1 / 2)
    assert sum(plan.memory_gib.values()) == approx(plan.peak_gib) and plan.peak_gib == made().peak_gib
    # of half the rank: half of 2.5 times the adapter, and of the moments that lie on the device
    assert plan.knobs[-1].saves_gib == approx((2.5 / 16 + 1 / 64) / 2)
