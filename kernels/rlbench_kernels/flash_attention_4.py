"""The calls of `packed_attention` and `gathered_attention` by FlashAttention 4 (package flash-attn-4), on Hopper and
data-centre Blackwell.

Its public function lets no gradient start from an output and a softmax denominator that were joined from two calls, so
the two functions below it are called, those that torch's own adapter (torch.nn.attention) uses; a version in which
they are missing is not used. A first call compiles for its head size and masks, kept on disk for later processes
(FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED, set here where it is not).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MODULE = "flash_attn.cute.interface"
_CAPABILITIES = (9, 10)


@cache
def problem(device: torch.device) -> str:
    """Why FlashAttention 4 cannot run on `device` (CUDA); empty where it can."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _CAPABILITIES:
        return f"flash-attn-4 has no kernels for compute capability {major}.{minor}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn-4 is not installed"
    try:
        _interface()
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return (
            f"flash-attn-4 cannot be used: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return ""


@cache
def _interface() -> Any:
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    for package in ("cutlass", "quack", "flash_attn"):  # hundreds of lines on what its own modules should call instead
        warnings.filterwarnings("ignore", module=rf"{package}\b")
    module = importlib.import_module(_MODULE)
    assert callable(module._flash_attn_fwd) and callable(module._flash_attn_bwd)
    return module


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int, *, is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [T, Hq, d] and lse float32 [Hq, T]; a row without keys gets out 0.

    Args:
        q: [T, Hq, d], 16 bits; k, v: [S, Hk, d].
        q_starts, k_starts: int32 [B + 1], bounds of the B sequences.
        max_q, max_k: the longest of them.
        is_causal: masks by the end: the last query sees all keys.
        scale: of the scores.
    """
    out, lse, *_ = _interface()._flash_attn_fwd(
        q, k, v, cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, max_seqlen_q=max_q, max_seqlen_k=max_k,
        softmax_scale=scale, causal=is_causal, return_lse=True,
    )  # fmt: skip
    return out, lse


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_starts: Tensor, k_starts: Tensor,
    max_q: int, max_k: int, state: Sequence[Tensor], *, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of q, k and v, given the gradient of `out`; `state` is not used. Arguments as in `forward`."""
    del state
    return _interface()._flash_attn_bwd(
        q, k, v, out, grad, lse, softmax_scale=scale, causal=is_causal, cu_seqlens_q=q_starts, cu_seqlens_k=k_starts,
        max_seqlen_q=max_q, max_seqlen_k=max_k, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
