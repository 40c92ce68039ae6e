"""Tiny models of a family with random weights, norms and biases that are not 1 and 0."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def random_base(family: str, seed: int = 0, **options: Any):
    """A frozen float32 model on the CPU.

    Args:
        family: `config.model_type`.
        options: of its config, in place of those here.
    """
    sizes = {
        "vocab_size": 98, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    if family.startswith("gemma"):
        sizes |= {"head_dim": 32, "query_pre_attn_scalar": 24, "hidden_size": 48}  # 32 is not 48 / 4
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**sizes, **options})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False).eval()
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return base
