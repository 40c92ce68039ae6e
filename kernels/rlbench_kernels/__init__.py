"""Fused operations; each has a PyTorch reference."""

from rlbench_kernels.fp8 import FP8, Fp8Weight, dequantize_fp8, quantize_fp8
from rlbench_kernels.gated_activation import geglu, swiglu
from rlbench_kernels.linear_logprobs import linear_logprobs, linear_token_loss
from rlbench_kernels.linear_logprobs_sparse import SparseGradient, SparseStats
from rlbench_kernels.linear_logprobs_support import support_thresholds
from rlbench_kernels.logprobs import logprobs
from rlbench_kernels.lora_dropout import LoraDropout, seeded_dropout
from rlbench_kernels.lora_linear import Lora, lora_linear, lora_mlp, lora_qkv
from rlbench_kernels.lora_matmuls import Adapters
from rlbench_kernels.merge_lora import merge_lora_
from rlbench_kernels.nf4 import Nf4Weight, dequantize_nf4, quantize_nf4
from rlbench_kernels.nf4_join import join_rows
from rlbench_kernels.norms import add_rms_norm, forked_rms_norm, rms_norm
from rlbench_kernels.packed_attention import SharedPromptLayout, packed_attention
from rlbench_kernels.rope import apply_rope
from rlbench_kernels.scaled_copies import ScaledCopies

__all__ = [
    "FP8",
    "Adapters",
    "Fp8Weight",
    "Lora",
    "LoraDropout",
    "Nf4Weight",
    "ScaledCopies",
    "SharedPromptLayout",
    "SparseGradient",
    "SparseStats",
    "add_rms_norm",
    "apply_rope",
    "dequantize_fp8",
    "dequantize_nf4",
    "forked_rms_norm",
    "geglu",
    "join_rows",
    "linear_logprobs",
    "linear_token_loss",
    "logprobs",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "merge_lora_",
    "packed_attention",
    "quantize_fp8",
    "quantize_nf4",
    "rms_norm",
    "seeded_dropout",
    "support_thresholds",
    "swiglu",
]
