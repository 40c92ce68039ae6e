"""What the hardware decides, and that a user's own value always wins."""

import pytest

from rlbench.config.derive import HardwareFacts, derive
from rlbench.config.schema import EngineConfig, HardwareConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig


def facts(device="cpu", problem="vllm is not installed", bfloat16_gflops=400.0):
    return HardwareFacts(
        device=device,
        device_name="a GPU" if device == "cuda" else "no GPU",
        num_cores=2,
        memory_gib=75.0 if device == "cuda" else 20.0,
        matmul_gflops={"bfloat16": bfloat16_gflops, "float32": 150.0},
        vllm_problem=problem,
    )


def derived(config: RunConfig, **kwargs) -> dict[str, object]:
    return {d.key: d.value for d in derive(config, facts(**kwargs))}


def test_a_cpu_takes_our_engine_on_one_shared_base_in_the_faster_dtype():
    config = RunConfig()

    found = derived(config)

    assert (config.hardware.profile, config.engine.kind, config.engine.share) == ("cpu", "hf", True)
    assert config.model.dtype == "bfloat16"
    assert "engine.kv_cache_gib" not in found


@pytest.mark.parametrize(("bfloat16_gflops", "dtype"), [(140.0, "bfloat16"), (40.0, "float32")])
def test_float32_needs_a_clear_gain_not_a_busy_moment(bfloat16_gflops, dtype):
    assert derived(RunConfig(), bfloat16_gflops=bfloat16_gflops)["model.dtype"] == dtype


def test_a_gpu_with_a_tested_vllm_shares_vllms_weights():
    config = RunConfig(model=ModelConfig(quantization="nf4"))

    found = derived(config, device="cuda", problem="")

    assert (config.engine.kind, config.engine.share) == ("vllm", True)
    assert found["engine.kv_cache_gib"] == 30.0


@pytest.mark.parametrize(
    ("engine", "options", "found"),
    [
        ({}, {}, ("hf", True)),
        ({}, {"device": "cuda", "problem": ""}, ("vllm", True)),
        ({"kind": "vllm", "share": False}, {"device": "cuda", "problem": ""}, ("vllm", False)),
        ({"kind": "hf"}, {"device": "cuda", "problem": ""}, ("hf", True)),
        ({"kind": "vllm"}, {"problem": ""}, ("vllm", False)),
    ],
)
def test_fp8_goes_with_every_engine_that_computes_it(engine, options, found):
    config = RunConfig(model=ModelConfig(quantization="fp8"), engine=EngineConfig(**engine))

    derived(config, **options)

    assert (config.engine.kind, config.engine.share) == found


def test_a_gpu_without_a_usable_vllm_falls_back_and_says_why():
    reasons = {d.key: d.reason for d in derive(RunConfig(), facts("cuda", "vllm 0.99 is not tested"))}

    assert "vllm 0.99 is not tested" in reasons["engine.kind"]


def test_what_the_user_set_is_not_derived():
    config = RunConfig(engine=EngineConfig(kind="hf", max_num_seqs=3), model=ModelConfig(path="x", dtype="float32"))

    found = derived(config, device="cuda", problem="")

    assert not {"engine.kind", "engine.max_num_seqs", "model.path", "model.dtype"} & set(found)
    assert (config.engine.kind, config.engine.max_num_seqs, config.model.dtype) == ("hf", 3, "float32")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (RunConfig(hardware=HardwareConfig(profile="gpu")), {}, "hardware.profile is gpu, but torch sees no CUDA"),
        (RunConfig(engine=EngineConfig(kind="vllm")), {}, "vllm is not installed"),
        (RunConfig(engine=EngineConfig(kind="hf", share=False)), {}, "engine=hf always shares"),
        (RunConfig(engine=EngineConfig(kind="vllm", share=True)), {"problem": ""}, "vLLM on a CPU repacks the weights"),
        (
            RunConfig(model=ModelConfig(quantization="nf4")),
            {},
            "model.quantization is nf4, which needs engine=vllm with engine.share=true on a GPU; found engine=hf",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(config, options, message):
    with pytest.raises(ValueError, match=message):
        derive(config, facts(**options))


@pytest.mark.parametrize(("name", "unpaged"), [("paged_adamw", "adamw"), ("paged_adamw_8bit", "adamw_8bit")])
def test_paged_moments_need_a_gpu(name, unpaged):
    message = f"optim.name is {name}, .* found hardware=cpu; expected a GPU, or optim={unpaged}$"
    for hardware, device in ((HardwareConfig(), "cpu"), (HardwareConfig(profile="cpu"), "cuda")):
        with pytest.raises(ValueError, match=message):
            derive(RunConfig(optim=OptimConfig(name=name), hardware=hardware), facts(device=device))

    derive(RunConfig(optim=OptimConfig(name=name)), facts(device="cuda"))
    derive(RunConfig(optim=OptimConfig(name=unpaged)), facts())


def test_a_guide_needs_vllm():
    config = RunConfig(sampling=SamplingConfig(guided_regex="[0-9]+"))

    with pytest.raises(ValueError, match=r"sampling\.guided_regex is set, which engine=hf cannot follow"):
        derive(config, facts())


@pytest.mark.parametrize(("device", "kind"), [("cpu", "hf"), ("cpu", "vllm"), ("cuda", "hf")])
def test_deterministic_kernels_need_vllm_on_a_gpu(device, kind):
    config = RunConfig(engine=EngineConfig(kind=kind, deterministic=True))

    with pytest.raises(ValueError, match=f"needs engine=vllm on a GPU .*; found engine={kind}"):
        derive(config, facts(device=device, problem=""))
    derive(RunConfig(engine=EngineConfig(deterministic=True)), facts(device="cuda", problem=""))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fp8_keys_and_values_need_vllm(device):
    config = RunConfig(engine=EngineConfig(kind="hf", kv_cache_dtype="fp8"))

    with pytest.raises(ValueError, match=r"engine\.kv_cache_dtype is fp8, which engine=hf .*expected engine=vllm or"):
        derive(config, facts(device=device, problem=""))
    derive(RunConfig(engine=EngineConfig(kind="vllm", kv_cache_dtype="fp8")), facts(device=device, problem=""))


def test_another_type_of_keys_and_values_is_refused():
    with pytest.raises(ValueError, match=r"engine\.kv_cache_dtype is 'fp8_e5m2', expected one of: auto, fp8"):
        EngineConfig(kv_cache_dtype="fp8_e5m2")
