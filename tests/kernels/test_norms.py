"""`rms_norm` and `add_rms_norm` against float64 and against transformers' modules; the kernels compiled for Hopper."""

import importlib
import re

import pytest
import torch

from rlbench_kernels import add_rms_norm, forked_rms_norm, rms_norm
from tests.kernels.interpreter import on_cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(*shape, dtype=torch.float64, seed=0):
    """x, residual and weight; rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-2, 2, x[..., :1].numel(), dtype=torch.float64).view(*shape[:-1], 1)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, residual, weight)]


def exact_norm(x, weight, eps, offset=0.0):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.double() + offset)


def error(actual, exact):
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck(offset):
    x, residual, weight = inputs(3, 2, 6)
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-5, offset=offset), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, 1e-5, offset=offset), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda *a: forked_rms_norm(*a, 1e-5, offset=offset), (x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_match_float64(dtype, offset):
    x, residual, weight = inputs(17, 48, dtype=dtype)
    normed, new_residual = add_rms_norm(x, residual, weight, 1e-6, offset=offset)
    grads = [torch.randn(17, 48, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2)]
    actual = torch.autograd.grad((normed, new_residual), (x, residual, weight), grads)
    hidden, wide = new_residual.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        (exact_norm(hidden, wide, 1e-6, offset), hidden), (hidden, hidden, wide), [g.double() for g in grads]
    )
    for mine, best in zip(actual, exact, strict=True):
        assert error(mine, best) < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_llama_module(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, residual, weight = inputs(5, 7, 64, dtype=dtype)
    module = LlamaRMSNorm(64, eps=1e-5)
    module.weight = torch.nn.Parameter(weight.detach())
    assert torch.equal(rms_norm(x, weight, 1e-5), module(x))
    normed, new_residual = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, x + residual) and torch.equal(normed, module(x + residual))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_gemma_module(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    x, _, weight = inputs(5, 7, 64, dtype=dtype)
    module = Gemma3RMSNorm(64, eps=1e-6)
    module.weight = torch.nn.Parameter(weight.detach())
    assert torch.equal(rms_norm(x, weight, 1e-6, offset=1.0), module(x))


def test_a_float32_weight_promotes_as_in_the_llama_module():
    x, _, weight = inputs(4, 16, dtype=torch.bfloat16)
    assert rms_norm(x, weight.float(), 1e-5).dtype == torch.float32
    assert rms_norm(x, weight.float(), 1e-5, offset=1.0).dtype == torch.bfloat16


def test_heads_inside_a_fused_projection():
    fused = inputs(5, 3 * 4 * 8)[0]
    keys = fused.view(5, 12, 8)[:, 4:8]
    weight = inputs(8)[2]
    torch.testing.assert_close(rms_norm(keys, weight, 1e-6), exact_norm(keys, weight, 1e-6))
    (grad,) = torch.autograd.grad(rms_norm(keys, weight, 1e-6).sum(), fused)
    (exact,) = torch.autograd.grad(exact_norm(keys, weight, 1e-6).sum(), fused)
    torch.testing.assert_close(grad, exact)


def test_either_result_may_go_unused_and_a_frozen_weight_gets_no_gradient():
    x, residual, weight = inputs(4, 6)
    frozen = weight.detach()
    normed, new_residual = add_rms_norm(x, residual, frozen, 1e-6)
    (only_residual,) = torch.autograd.grad(new_residual.sum(), x, retain_graph=True)
    assert torch.equal(only_residual, torch.ones_like(x))
    (only_normed,) = torch.autograd.grad(normed.sum(), residual)
    hidden = (x + residual).detach().requires_grad_()
    (exact,) = torch.autograd.grad(exact_norm(hidden, frozen, 1e-6).sum(), hidden)
    torch.testing.assert_close(only_normed, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forking_is_adding_nothing(dtype):
    """Bit for bit, whichever results are used."""
    x, _, weight = inputs(17, 48, dtype=dtype)
    forked = forked_rms_norm(x, weight, 1e-6)
    added = add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)
    assert torch.equal(forked[0], added[0]) and torch.equal(forked[1], x)
    grads = [torch.randn(17, 48, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2)]
    for used in ([0, 1], [0], [1]):
        of_forked, of_added = (
            torch.autograd.grad([results[i] for i in used], x, [grads[i] for i in used], retain_graph=True)[0]
            for results in (forked, added)
        )
        assert torch.equal(of_forked, of_added)


def test_inputs_are_kept_and_no_rows_are_allowed():
    x, residual, weight = (t.detach() for t in inputs(3, 4))
    before = [t.clone() for t in (x, residual, weight)]
    add_rms_norm(x, residual, weight, 1e-6)
    assert all(map(torch.equal, (x, residual, weight), before))
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 4)


def test_what_does_not_fit_is_refused():
    x, residual, weight = inputs(3, 4)
    with pytest.raises(ValueError, match=r"weight \[D\]"):
        rms_norm(x, weight[:3], 1e-6)
    with pytest.raises(ValueError, match="eps"):
        rms_norm(x, weight, -1.0)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, residual[:2], weight, 1e-6)


def compiled_gradients(size, has_residual=False, has_weight=False):
    """PTX of the backward pass of contiguous bf16 rows, for a GPU that need not be there."""
    module = importlib.import_module("rlbench_kernels.norms_triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    names = module._norm_gradients.arg_names
    launch = dict(module._tile(size, has_weight))
    num_warps = launch.pop("num_warps")
    constants = launch | {"D": size, "HAS_RESIDUAL": has_residual, "HAS_WEIGHT": has_weight}
    absent = {"inner": True, "grad_inner": True, "grad_residual": not has_residual, "grad_weight": not has_weight}
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    pointers = dict.fromkeys(("grad_x", "x", "weight", "grad", "grad_residual"), "*bf16") | {"grad_weight": "*fp32"}
    types = {n: "i32" for n in names} | pointers | {"eps": "fp32", "offset": "fp32"}
    divisible = [n for n in names if n not in constants and n not in ("num_rows", "eps", "offset")]
    source = compiler.ASTSource(
        module._norm_gradients,
        types | dict.fromkeys(constants, "constexpr"),
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    options = {"num_warps": num_warps}
    return importlib.import_module("triton").compile(source, target=target, options=options).asm["ptx"]


def count(instruction, ptx):
    return len(re.findall(rf"\b{re.escape(instruction)}\b", ptx))


@on_cpu
@pytest.mark.parametrize("has_residual", [False, True])
def test_the_backward_pass_of_a_frozen_weight_exchanges_its_sums_once(has_residual):
    ptx = compiled_gradients(4096, has_residual)
    assert 1 <= count("bar.sync", ptx) <= 2  # Triton 3.6 needs a second one to share the sum
    assert count("ld.global.v4.b32", ptx) == count("ld.global", ptx) >= (4 if has_residual else 3)
    assert count("bra", ptx) == 0 and count("div.s32", ptx) == 0


@on_cpu
def test_short_rows_need_no_barrier():
    ptx = compiled_gradients(128)
    assert count("bar.sync", ptx) == 0 and count("ld.global.v4.b32", ptx) == count("ld.global", ptx) >= 3


@on_cpu
def test_the_gradient_of_the_weight_needs_no_atomics():
    ptx = compiled_gradients(4096, has_weight=True)
    assert count("bra", ptx) > 0 and not re.search(r"\b(atom|red)\.global", ptx)
