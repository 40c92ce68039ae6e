"""`grad="sparse"` behind the Triton kernels: on the GPU, and for small sizes under Triton's interpreter."""

from typing import Any

import pytest
import torch

from rlbench_kernels import SparseGradient, linear_logprobs, linear_token_loss
from tests.kernels.interpreter import DEVICE, IS_INTERPRETED, gpu, needs_device, on_cpu, run_interpreted
from tests.kernels.test_linear_logprobs import OPTIONS, columns, error, expected, inputs, options
from tests.kernels.test_linear_logprobs_sparse import (
    block_errors,
    exact_gradient,
    gradient,
    llm_inputs,
    policy_loss,
    weighted_errors,
)
from tests.kernels.test_linear_logprobs_triton import fused, small_tiles, to_device  # noqa: F401

ROWS = 8  # of a chunk, and so of a block, in the fixtures


@gpu
@needs_device
@pytest.mark.parametrize("tiles", ["small_tiles", "fused"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_keep_their_bits_and_sums_are_unbiased(name, tiles, request):
    request.getfixturevalue(tiles)
    hidden, weight, targets = to_device(*inputs(n=11, d=24, v=300, dtype=torch.float32))
    chosen: dict[str, Any] = {
        k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in options(name, 11, 300, torch.float32).items()
    }
    if "softcap" in chosen:
        chosen["softcap"] = 12.0
    sparse = SparseGradient(eps=3e-3, block_rows=ROWS, max_kept_frac=1.0)
    dense = linear_logprobs(hidden, weight, targets, **chosen)
    values = linear_logprobs(hidden, weight, targets, **chosen, grad="sparse", sparse=sparse)
    assert all(map(torch.equal, values, dense))
    ones = torch.ones(11, device=DEVICE)
    found = gradient(hidden, weight, targets, ones, **chosen, grad="sparse", sparse=sparse)
    exact = exact_gradient(hidden, weight, targets, ones, **chosen)
    assert sparse.stats is not None and float(sparse.stats.fallback_frac) == 0 < float(sparse.stats.tail_mass)
    assert 1e-4 < error(found, exact) < 0.1
    assert max(block_errors(found, exact, ROWS)) < 1e-5


@gpu
@needs_device
@pytest.mark.parametrize("tiles", ["small_tiles", "fused"])
def test_token_loss_and_masked_nan_rows(tiles, request):
    request.getfixturevalue(tiles)
    hidden, weight, targets = to_device(*inputs(n=11, d=24, v=300, dtype=torch.float32))
    parts = {name: x.to(DEVICE) for name, x in columns(11, dtype=torch.float32).items()}
    parts["old"] = linear_logprobs(hidden, weight, targets)[0].detach() + 0.1 * parts["advantages"].roll(1)
    poisoned = torch.where(parts["mask"][:, None], hidden.detach(), torch.nan).requires_grad_()
    sparse = SparseGradient(eps=3e-3, block_rows=ROWS, max_kept_frac=1.0)
    loss, _, _ = linear_token_loss(poisoned, weight, targets, policy_loss, parts, grad="sparse", sparse=sparse)
    (found,) = torch.autograd.grad(loss, poisoned)
    wide = hidden.detach().double().requires_grad_()
    exact_loss, _ = policy_loss(*expected(wide, weight, targets), parts)
    (exact,) = torch.autograd.grad(exact_loss, wide)
    assert (found[~parts["mask"]] == 0).all() and 1e-4 < error(found, exact) < 0.1
    assert max(weighted_errors(found, exact, ROWS)) < 1e-5


@gpu
@pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason="bfloat16 matmuls need a CUDA device")
@pytest.mark.parametrize("n", [513, 1])
def test_bfloat16_on_the_gpu(n):
    hidden, weight, targets = to_device(*llm_inputs(n, d=256, v=49152, dtype=torch.bfloat16))
    ones = torch.ones(n, device=DEVICE)
    sparse = SparseGradient()
    found = gradient(hidden, weight, targets, ones, grad="sparse", sparse=sparse)
    assert sparse.stats is not None and float(sparse.stats.fallback_frac) == 0
    assert error(found, exact_gradient(hidden, weight, targets, ones)) < 8e-3


@on_cpu
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)
