"""A resumed run goes on as it began."""

from dataclasses import asdict

import pytest

from rlbench.config.optim import GaloreConfig, OptimConfig
from rlbench.config.resume import check_resumable, keep_derived
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


@pytest.mark.parametrize(("kind", "kept"), [("hf", []), ("vllm", [4.0, "merged"]), ("auto", [4.0, "merged"])])
def test_what_vllm_alone_reads_is_kept_for_vllm_alone(kind, kept):
    derived = {"engine.kind": "vllm", "engine.kv_cache_gib": 4.0, "engine.dense_copies": "merged"}
    config = RunConfig(engine=EngineConfig(kind=kind))

    keep_derived(config, {key: {"value": value, "reason": "its run"} for key, value in derived.items()})

    assert [value for value in (config.engine.kv_cache_gib, config.engine.dense_copies) if value is not None] == kept


def test_an_optimizer_whose_state_would_not_fit_is_refused_and_its_other_settings_are_told():
    before = asdict(RunConfig())
    galore = asdict(RunConfig(optim=OptimConfig(name="galore")))
    with pytest.raises(ValueError, match=r"optim\.name was 'adamw' in the run"):
        check_resumable(before, galore)
    for one, other in (("adamw", "paged_adamw"), ("paged_adamw_8bit", "adamw_8bit")):
        configs = [asdict(RunConfig(optim=OptimConfig(name=name))) for name in (one, other)]
        with pytest.raises(
            ValueError, match=rf"optim\.name was '{one}' in the run that is resumed and is '{other}' now"
        ):
            check_resumable(*configs)
    with pytest.raises(ValueError, match=r"optim\.galore\.rank was 128 in the run"):
        check_resumable(galore, asdict(RunConfig(optim=OptimConfig(name="galore", galore=GaloreConfig(rank=64)))))

    (told,) = check_resumable(before, asdict(RunConfig(optim=OptimConfig(beta1=0.8))))
    assert told.startswith("optim.beta1 was 0.9")


def test_a_run_from_before_a_setting_had_its_default():
    before = asdict(RunConfig())
    del before["optim"]["galore"]

    assert check_resumable(before, asdict(RunConfig())) == []
