"""A resumed run goes on as it began."""

from rlbench.config.resume import keep_derived
from rlbench.config.schema import EngineConfig, RunConfig

DERIVED = {
    "model.dtype": {"value": "float32", "reason": "measured"},
    "training.num_steps": {"value": 24, "reason": "cpu profile"},
    "engine.kind": {"value": "hf", "reason": "no GPU"},
    "hardware.num_threads": {"value": 8, "reason": "8 cores"},
}


def test_what_was_derived_is_kept_but_not_what_the_user_sets_or_the_machine_decides():
    config = RunConfig(engine=EngineConfig(kind="vllm"))

    kept = keep_derived(config, DERIVED)

    assert kept == ["model.dtype=float32", "training.num_steps=24"]
    assert (config.model.dtype, config.training.num_steps, config.engine.kind) == ("float32", 24, "vllm")
    assert config.hardware.num_threads is None
