"""The Triton version: on the GPU, and for small sizes on CPU under Triton's interpreter."""

from itertools import product

import pytest
import torch

from rlbench_kernels import linear_logprobs, linear_token_loss
from tests.kernels.interpreter import DEVICE, IS_INTERPRETED, gpu, needs_device, on_cpu, run_interpreted
from tests.kernels.test_linear_logprobs import (
    OPTIONS,
    clipped_loss,
    columns,
    error,
    expected,
    inputs,
    options,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


@pytest.fixture
def small_tiles(triton_backend, monkeypatch):
    from rlbench_kernels import linear_logprobs_triton

    monkeypatch.setattr(linear_logprobs_triton, "_MAX_TILE", 128)
    monkeypatch.setattr(linear_logprobs_triton, "_MAX_ROWS", 8)


@pytest.fixture
def fused(triton_backend, poisoned_memory, monkeypatch):
    """The fused kernel on small tiles, also in float32 under the interpreter."""
    from rlbench_kernels import linear_logprobs_fused_triton as module
    from rlbench_kernels import linear_logprobs_sparse_triton as sparse_module

    if IS_INTERPRETED:
        monkeypatch.setattr(module, "can_fuse", lambda hidden, head: head.lora is None)
        for name, value in {"_ROWS": 8, "_BLOCK_M": 16, "_BLOCK_N": 64, "_BLOCK_K": 16}.items():
            monkeypatch.setattr(module, name, value)
        for name, value in {"_ROWS": 4, "_COLUMNS": 16, "_BLOCK_M": 16, "_BLOCK_N": 16, "_BLOCK_K": 16}.items():
            monkeypatch.setattr(sparse_module, name, value)


def to_device(*tensors):
    return [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors]


def check(name, dtype, n, v, scale=1.0):
    hidden, weight, targets = to_device(*inputs(n=n, d=24, v=v, dtype=dtype))
    hidden = (hidden.detach() * scale).requires_grad_()
    chosen = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in options(name, n, v, dtype).items()}
    results = linear_logprobs(hidden, weight, targets, **chosen)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = expected(exact_hidden, weight, targets, **chosen)
    g = torch.linspace(-1, 2, n, device=DEVICE)
    for coefficients in ((1.0, 0.0), (0.5, -2.0)):
        terms = [c * (r * g).sum() for c, r in zip(coefficients, results, strict=True) if c]
        exact_terms = [c * (r * g).sum() for c, r in zip(coefficients, exact, strict=True) if c]
        (grad,) = torch.autograd.grad(sum(terms), hidden, retain_graph=True)
        (exact_grad,) = torch.autograd.grad(sum(exact_terms), exact_hidden, retain_graph=True)
        assert error(grad, exact_grad) < TOLERANCE[dtype]
    # float32 scores near 1000 are rounded by 1e-4, and the entropy with them
    assert error(results[0], exact[0]) < 1e-5
    assert (results[1] - exact[1]).abs().max().item() < 3e-5 * max(1.0, scale)
    with torch.no_grad():
        assert all(map(torch.equal, linear_logprobs(hidden, weight, targets, **chosen), results))


@gpu
@needs_device
@pytest.mark.parametrize("name", OPTIONS)
def test_float32_matches_float64(name, small_tiles):
    check(name, torch.float32, n=11, v=300)


@gpu
@needs_device
def test_scores_that_rise_far_above_the_first_tile(small_tiles):
    check("plain", torch.float32, n=11, v=300, scale=40.0)


@pytest.mark.skipif(not IS_INTERPRETED, reason="float32 runs in the fused kernel under the interpreter alone")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("n", "v"), [(11, 300), (1, 7)])
def test_the_fused_kernel_matches_float64(name, n, v, fused):
    check(name, torch.float32, n=n, v=v)


@gpu
@needs_device
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_fused_kernel_with_targets_far_below_the_best_token(scale, fused):
    # scores of standard deviation 300 and more: most targets lie hundreds of nats below the best token
    dtype = torch.float32 if IS_INTERPRETED else torch.bfloat16
    n, v = (11, 300) if IS_INTERPRETED else (3001, 70000)
    check("plain", dtype, n=n, v=v, scale=scale)


@gpu
@needs_device
def test_a_nan_row_stays_nan_and_spoils_no_other(fused):
    dtype = torch.float32 if IS_INTERPRETED else torch.bfloat16
    hidden, weight, targets = to_device(*inputs(n=11, d=24, v=300, dtype=dtype))
    clean = linear_logprobs(hidden, weight, targets)[0]
    broken = hidden.detach().clone()
    broken[3] = torch.nan
    broken.requires_grad_()

    found = linear_logprobs(broken, weight, targets)[0]
    upstream = torch.ones(11, device=DEVICE).index_fill_(0, torch.tensor([3], device=DEVICE), 0.0)
    (grad,) = torch.autograd.grad(found, broken, upstream)

    assert found[3].isnan() and torch.equal(found[4:], clean[4:]) and torch.equal(found[:3], clean[:3])
    assert grad[3].eq(0).all() and grad.isfinite().all()


@gpu
@needs_device
def test_token_loss_and_head_gradients_match_float64(small_tiles):
    for entropy_coef, is_trained in product((0.0, 0.3), (False, True)):
        hidden, weight, targets = to_device(*inputs(n=11, d=24, v=300, dtype=torch.float32))
        weight.requires_grad_(is_trained)
        parts = {k: x.to(DEVICE) for k, x in columns(11, entropy_coef, torch.float32).items()}
        loss, metrics, _ = linear_token_loss(hidden, weight, targets, clipped_loss, parts, temperature=0.7)
        exact_loss, exact_metrics = clipped_loss(*expected(hidden, weight, targets, temperature=0.7), parts)
        tensors = [hidden, weight] if is_trained else [hidden]
        exact_grads = torch.autograd.grad(exact_loss, tensors)
        for grad, exact_grad in zip(torch.autograd.grad(loss, tensors), exact_grads, strict=True):
            assert error(grad, exact_grad) < 1e-5
        for key, value in metrics.items():
            torch.testing.assert_close(value.double(), exact_metrics[key].detach(), rtol=1e-5, atol=1e-5)


@gpu
@pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason="bfloat16 matmuls need a CUDA device")
@pytest.mark.parametrize(("n", "v"), [(1, 7), (513, 49152), (4099, 128256)])
def test_bfloat16_matches_float64_on_the_gpu(n, v):
    for name in ("plain", "all"):
        check(name, torch.bfloat16, n, v)


@on_cpu
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)
