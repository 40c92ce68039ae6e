"""What vLLM would refuse in fifty lines, or only at the first step, said before it starts."""

from __future__ import annotations

from typing import Any

import torch

from rlbench.engine.vllm_process import clean_start
from rlbench.models.base import check_quantization, check_text_model

_SLOT_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM's LoRA buffers can have
_FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply FP8; for others vLLM repacks the weights


def slot_rank(lora_rank: int) -> int:
    """Smallest rank of vLLM's buffers that holds `lora_rank`."""
    for rank in _SLOT_RANKS:
        if 1 <= lora_rank <= rank:
            return rank
    raise ValueError(f"lora.rank {lora_rank}, expected 1 to {_SLOT_RANKS[-1]} for engine.kind=vllm")


def check_model(model_path: str, platform: str, max_model_len: int, quantization: str) -> None:
    """One sentence for what vLLM would say in fifty lines, or only at the first step."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path, local_files_only=True)
    check_text_model(config, model_path)
    check_quantization(model_path, config, quantization)
    config = config.get_text_config()
    context = config.max_position_embeddings
    if max_model_len > context:
        raise ValueError(f"engine: max_model_len {max_model_len} exceeds the model's context of {context}")
    if platform == "cpu":
        head_dim = _head_dim(config)
        supported = _cpu_head_sizes()
        if head_dim not in supported:
            raise ValueError(
                f"engine.kind=vllm: attention heads of size {head_dim}, vLLM on a CPU computes {supported}; expected "
                f"engine.kind=hf for this model"
            )


def check_formats(device: str, dtype: str, *, quantization: str, dense_copies: str, has_adapter: bool) -> None:
    """
    Raises:
        ValueError: numbers that vLLM does not compute with here, or copies of layers where there is nothing to copy or
            to merge.
    """
    if device == "cuda" and dtype == "float32":
        raise ValueError(
            "model.dtype is float32, which vLLM's LoRA kernels on a GPU do not compute; expected bfloat16, float16 or "
            "engine.kind=hf"
        )
    if quantization == "fp8":
        check_fp8(device, dtype)
    can_merge = quantization in ("none", "nf4") and dtype == "bfloat16" and has_adapter
    is_possible = device == "cuda" and (quantization == "nf4" if dense_copies == "base" else can_merge)
    if dense_copies != "none" and not is_possible:
        expected = {"base": "an NF4 base", "merged": "an NF4 or dense base, model.dtype=bfloat16 and an adapter"}
        raise ValueError(
            f"engine.dense_copies is {dense_copies}, which needs a GPU, {expected[dense_copies]}; found {device}, "
            f"model.quantization={quantization}, model.dtype={dtype}, "
            f"{'an adapter' if has_adapter else 'all weights'} trained"
        )


def check_fp8(device: str, dtype: str) -> None:
    if dtype == "float32":
        raise ValueError(
            "model.dtype is float32, which vLLM does not compute on an FP8 base (model.quantization=fp8); expected "
            "bfloat16, float16 or engine.kind=hf"
        )
    found = torch.cuda.get_device_capability() if device == "cuda" else _FP8_CAPABILITY
    if found < _FP8_CAPABILITY:
        raise ValueError(
            f"model.quantization is fp8 on a GPU of compute capability {found[0]}.{found[1]}, but vLLM multiplies FP8 "
            "from 8.9 on (Ada, Hopper); expected engine.kind=hf or another model.quantization"
        )


def check_kv_cache_dtype(kv_cache_dtype: str, model_path: str, device: str) -> None:
    """
    Raises:
        ValueError: keys and values in FP8 where vLLM's attention has no kernel for them.
    """
    if kv_cache_dtype != "fp8":
        return
    expected = "expected engine.kv_cache_dtype=auto"
    if device == "cuda":
        found = torch.cuda.get_device_capability()
        if found < _FP8_CAPABILITY:
            raise ValueError(
                f"engine.kv_cache_dtype is fp8 on a GPU of compute capability {found[0]}.{found[1]}, but vLLM's "
                f"attention reads FP8 from 8.9 on (Ada, Hopper); {expected}"
            )
        return
    if not torch.cpu._is_avx512_supported():
        raise ValueError(
            f"engine.kv_cache_dtype is fp8 on a CPU without AVX-512, which vLLM's attention reads FP8 with; {expected}"
        )
    from transformers import AutoConfig

    head_dim = _head_dim(AutoConfig.from_pretrained(model_path, local_files_only=True).get_text_config())
    if head_dim % 32:
        raise ValueError(
            f"engine.kv_cache_dtype is fp8 and attention heads have size {head_dim}, but vLLM on a CPU reads FP8 in "
            f"multiples of 32; {expected}"
        )


def _head_dim(config: Any) -> int:
    """Of a text config from transformers."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _cpu_head_sizes() -> list[int]:
    with clean_start():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # pyright: ignore
    return CPUAttentionBackend.get_supported_head_sizes()
