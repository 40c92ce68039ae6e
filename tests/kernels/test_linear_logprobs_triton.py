"""The Triton version: on the GPU, and for small sizes on CPU under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from rlbench_kernels import linear_logprobs, linear_token_loss
from tests.kernels.test_linear_logprobs import (
    OPTIONS,
    clipped_loss,
    columns,
    error,
    expected,
    inputs,
    options,
)

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
gpu = pytest.mark.gpu
needs_device = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1"
)


@pytest.fixture
def small_tiles(monkeypatch):
    from rlbench_kernels import linear_logprobs_triton

    monkeypatch.setenv("RLBENCH_KERNELS", "triton")
    monkeypatch.setattr(linear_logprobs_triton, "_MAX_TILE", 128)
    monkeypatch.setattr(linear_logprobs_triton, "_MAX_ROWS", 8)


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
    # float32 scores near 1000 are rounded by 1e-4, and a small entropy with them
    assert error(results[0], exact[0]) < 1e-5 and error(results[1], exact[1]) < 1e-4 * max(1.0, scale / 10)
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


@pytest.mark.skipif(IS_INTERPRETED or importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter():
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "RLBENCH_KERNELS": "triton"}
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "--confcutdir", str(here.parent), str(here)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
