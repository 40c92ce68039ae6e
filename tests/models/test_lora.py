"""LoRA: the fused function against PEFT's own forward; saving and loading in PEFT's format."""

import pytest
import torch
from peft import PeftModel

from rlbench.config.schema import LoraConfig
from rlbench.data.packing import pack
from rlbench.models.base import load_base, share_base, storage_bytes
from rlbench.models.lora import add_lora, export_adapter, unfuse_lora
from rlbench.models.policy import Policy
from tests.data.test_packing import make_sample


def randomise(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rslora", [False, True])
def test_fused_lora_equals_pefts_forward_and_gradients(tiny_base, rslora):
    tree = share_base(tiny_base)
    model = add_lora(tree, LoraConfig(rank=4, alpha=8, rslora=rslora), seed=0)
    randomise(model)
    token_ids = torch.randint(2, 98, (3, 11), generator=torch.Generator().manual_seed(0))
    outputs, grads = [], []
    for is_fused in (True, False):
        if not is_fused:
            unfuse_lora(model)
        model.zero_grad()
        logits = model(input_ids=token_ids).logits
        logits.square().mean().backward()
        outputs.append(logits.detach())
        grads.append(gradients(model))

    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_policy_shares_every_byte_of_the_base(tiny_base):
    policy = Policy(tiny_base, LoraConfig(rank=4), seed=0)
    adapter_bytes = sum(p.numel() * 4 for p in policy.parameters())

    assert storage_bytes(tiny_base, policy.model) == storage_bytes(tiny_base) + adapter_bytes


def test_the_initial_adapter_is_a_function_of_the_seed_alone(tiny_base):
    fingerprints = []
    for seed, global_seed in ((1, 10), (1, 11), (2, 10)):
        torch.manual_seed(global_seed)
        fingerprints.append(Policy(tiny_base, LoraConfig(rank=4), seed=seed).adapter().fingerprint())

    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_saved_adapter_loads_with_peft_and_gives_the_same_logits(tiny_base, tiny_folder, tmp_path):
    policy = Policy(tiny_base, LoraConfig(rank=4, alpha=8), seed=0)
    randomise(policy.model)
    policy.save_adapter(tmp_path / "adapter", str(tiny_folder))
    loaded = PeftModel.from_pretrained(
        load_base(str(tiny_folder), dtype=torch.float32, device="cpu"), str(tmp_path / "adapter")
    )
    (batch,) = pack([make_sample("a", [5, 6, 7], [8, 9, 10, 11])], tokens_per_microbatch=100, device="cpu")

    ours = policy.hidden(batch) @ policy.head_weight.T
    theirs = loaded(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, 2:]

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_exported_adapter_names_modules_of_the_base(tiny_base):
    adapter = export_adapter(Policy(tiny_base, LoraConfig(rank=4, alpha=8, targets="q_proj, down_proj"), seed=0).model)

    assert sorted(adapter.lora_a) == sorted(
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    assert adapter.scaling == 2.0


def test_unknown_targets_are_a_clear_error(tiny_base):
    with pytest.raises(ValueError, match="lora.targets=w_proj"):
        Policy(tiny_base, LoraConfig(targets="w_proj"), seed=0)
