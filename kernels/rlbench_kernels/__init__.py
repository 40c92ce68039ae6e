"""Fused operations; each has a PyTorch reference."""

from rlbench_kernels.linear_logprobs import linear_logprobs, linear_token_loss

__all__ = ["linear_logprobs", "linear_token_loss"]
