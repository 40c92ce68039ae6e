"""A run may start from the adapter of an earlier one; what does not fit is named."""

import pytest

from rlbench.config.schema import LoraConfig
from rlbench.models.policy import Policy
from rlbench.models.warm_start import find_adapter
from tests.models.test_lora import randomise

RANK = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    policy = Policy(tiny_base, LoraConfig(**RANK), seed=1)
    randomise(policy.model)
    folder = tmp_path_factory.mktemp("run")
    policy.save_adapter(folder / "adapter", "tiny")
    return policy, folder


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_the_policy_starts_from_the_named_adapter_bit_for_bit(tiny_base, trained, inside):
    policy, folder = trained

    started = Policy(tiny_base, LoraConfig(**RANK, init_from=str(folder / inside)), seed=2)

    assert started.adapter().fingerprint() == policy.adapter().fingerprint()
    assert Policy(tiny_base, LoraConfig(**RANK), seed=2).adapter().fingerprint() != policy.adapter().fingerprint()


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="lora.init_from is .*, but no adapter_model.safetensors is there"):
        find_adapter(LoraConfig(init_from=str(tmp_path)))


def test_a_run_that_was_stopped_names_its_newest_checkpoint(tmp_path):
    for step in (10, 20):
        (tmp_path / f"checkpoints/step-{step:06d}/adapter").mkdir(parents=True)

    with pytest.raises(ValueError, match="its newest checkpoint is lora.init_from=.*step-000020/adapter"):
        find_adapter(LoraConfig(init_from=str(tmp_path)))


@pytest.mark.parametrize(("key", "other"), [("rank", 8), ("alpha", 16.0), ("rslora", True)])
def test_other_settings_than_the_adapters(trained, key, other):
    config = LoraConfig(**{**RANK, key: other}, init_from=str(trained[1]))

    with pytest.raises(ValueError, match=rf"lora.{key} is {other}, but the adapter of lora.init_from=.* was made with"):
        find_adapter(config)


def test_other_targets_than_the_adapters(tiny_base, trained):
    with pytest.raises(ValueError, match="has other tensors than this run's; expected equal lora"):
        Policy(tiny_base, LoraConfig(**RANK, targets="q_proj", init_from=str(trained[1])), seed=0)
