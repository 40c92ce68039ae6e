"""How often Triton compiles over 100 random lengths: its own cache keys, counted for every op of the package.

Without a GPU kernels are neither compiled nor run: a driver that is made up stands in for the H100, so that Triton
still derives the key of each launch from its arguments.
"""

import importlib
import pkgutil
import random
from types import SimpleNamespace

import pytest
import torch

import rlbench_kernels
from rlbench_kernels import (
    Lora,
    LoraDropout,
    SharedPromptLayout,
    add_rms_norm,
    apply_rope,
    dequantize_fp8,
    dequantize_nf4,
    forked_rms_norm,
    geglu,
    linear_logprobs,
    linear_token_loss,
    logprobs,
    lora_linear,
    lora_mlp,
    lora_qkv,
    packed_attention,
    quantize_fp8,
    quantize_nf4,
    rms_norm,
    support_thresholds,
    swiglu,
)
from rlbench_kernels.packed_attention import join_parts
from tests.kernels.interpreter import IS_INTERPRETED

triton = pytest.importorskip("triton")
jit = importlib.import_module("triton.runtime.jit")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
LENGTHS = [1, 16, *random.Random(0).sample(range(2, 2000), 98)]
DEPTH, VOCABULARY = 64, 300
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing"),
]


class CompiledNothing:
    function = packed_metadata = None

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        return None


@pytest.fixture
def compilations(monkeypatch):
    """The names of the kernels compiled, once for each key."""
    names = []
    modules = [
        importlib.import_module(f"rlbench_kernels.{m.name}") for m in pkgutil.iter_modules(rlbench_kernels.__path__)
    ]
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, jit.JITFunction):
                value.device_caches.clear()
    compile_for_real = jit.JITFunction._do_compile

    def compile_or_count(self, key, *args, **kwargs):
        names.append(self.fn.__name__)
        if HAS_GPU:
            return compile_for_real(self, key, *args, **kwargs)
        self.device_caches[0][0][key] = kernel = CompiledNothing()
        return kernel

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_or_count)
    monkeypatch.setenv("RLBENCH_KERNELS", "triton")
    if not HAS_GPU:
        target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the CPU through; the kernels are imported without it
        monkeypatch.setattr(importlib.import_module("triton.runtime.driver").driver, "_active", SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target,
        ))  # fmt: skip
    yield names
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, jit.JITFunction) and not HAS_GPU:
                value.device_caches.clear()


def new(*shape):
    return torch.zeros(*shape, device=DEVICE, dtype=DTYPE).requires_grad_()


def back(*results):
    torch.autograd.backward(results, [torch.zeros_like(r) for r in results])


WEIGHT, HEAD = new(DEPTH).detach(), new(VOCABULARY, DEPTH).detach()
LORA = Lora(new(8, DEPTH), new(VOCABULARY, 8), 1.0)
PROJECTION = Lora(new(8, DEPTH), new(DEPTH, 8), 1.0)
BASE = new(DEPTH, DEPTH).detach()


def targets(n):
    return torch.zeros(n, dtype=torch.int64, device=DEVICE)


def head_options(n):
    hidden, temperature = new(n, DEPTH), torch.ones(n, device=DEVICE)
    support = support_thresholds(hidden, HEAD, temperature=temperature, top_p=0.9, top_k=20)
    return hidden, {"temperature": temperature, "support": support}


def run_linear_logprobs(n):
    back(linear_logprobs(new(n, DEPTH), HEAD, targets(n))[0])


def run_linear_logprobs_with_everything(n):
    hidden, options = head_options(n)
    back(*linear_logprobs(hidden, HEAD, targets(n), lora=LORA, softcap=3.0, bias=new(VOCABULARY), **options))


def run_linear_token_loss(n):
    hidden, options = head_options(n)
    loss, *_ = linear_token_loss(
        hidden, HEAD, targets(n), lambda p, h, c: ((p + h).sum(), {}), {}, softcap=3.0, **options
    )
    loss.backward()


def dropouts(n):
    """A seed a call and layer; the third is small and a multiple of 16."""
    return [LoraDropout(0.1, 2**62 + n), LoraDropout(0.1, 2**62 + 16 * n), LoraDropout(0.1, 16 * n)]


def run_attention(n):
    layout = SharedPromptLayout.from_lengths([(n, [n // 2, n // 3])], DEVICE)
    size = layout.num_tokens
    if HAS_GPU:
        back(packed_attention(new(size, 4, 64), new(size, 2, 64), new(size, 2, 64), layout, scale=0.125))
    else:
        lse = torch.zeros(4, size)
        rows = layout.completion_rows
        join_parts(torch.zeros(size, 4, 64), lse, torch.zeros(size, 4, 64), lse.clone(), rows)


OPS = {
    "logprobs": lambda n: back(*logprobs(new(n, VOCABULARY), targets(n))),
    "linear_logprobs": run_linear_logprobs,
    "linear_logprobs with everything": run_linear_logprobs_with_everything,
    "linear_token_loss": run_linear_token_loss,
    "support_thresholds": lambda n: support_thresholds(new(n, DEPTH), HEAD, top_p=0.9, min_p=0.01),
    "rms_norm": lambda n: back(rms_norm(new(n, DEPTH), WEIGHT, 1e-6)),
    "rms_norm of heads": lambda n: back(rms_norm(new(n, 3 * DEPTH).view(n, 3, DEPTH), WEIGHT, 1e-6)),
    "forked_rms_norm": lambda n: back(*forked_rms_norm(new(n, DEPTH), WEIGHT, 1e-6)),
    "add_rms_norm": lambda n: back(*add_rms_norm(new(n, DEPTH), new(n, DEPTH), WEIGHT, 1e-6)),
    "apply_rope": lambda n: back(
        *apply_rope(new(n, 4, 16), new(n, 2, 16), new(n, 16).detach(), new(n, 16).detach())
    ),
    "swiglu": lambda n: back(swiglu(new(n, DEPTH), new(n, DEPTH))),
    "geglu": lambda n: back(geglu(new(n, DEPTH), new(n, DEPTH))),
    "lora_linear": lambda n: back(lora_linear(new(n, DEPTH), BASE, *PROJECTION)),
    "lora_qkv": lambda n: back(*lora_qkv(new(n, DEPTH), [BASE] * 3, [PROJECTION] * 3)),
    "lora_mlp": lambda n: back(lora_mlp(new(n, DEPTH), BASE, BASE, BASE, [PROJECTION] * 3)),
    "lora_qkv with dropout": lambda n: back(
        *lora_qkv(new(n, DEPTH), [BASE] * 3, [PROJECTION] * 3, dropouts=dropouts(n))
    ),
    "lora_mlp with dropout": lambda n: back(
        lora_mlp(new(n, DEPTH), BASE, BASE, BASE, [PROJECTION] * 3, dropouts=dropouts(n))
    ),
    "dequantize_nf4": lambda n: dequantize_nf4(quantize_nf4(torch.ones(n, DEPTH, device=DEVICE, dtype=DTYPE))),
    "dequantize_fp8": lambda n: dequantize_fp8(quantize_fp8(torch.ones(n, DEPTH, device=DEVICE, dtype=DTYPE))),
    "packed_attention": run_attention,
}  # fmt: skip
WITHOUT_KERNELS = {"lora_linear", "lora_qkv"}  # library matmuls


@pytest.mark.parametrize("name", OPS)
def test_a_handful_of_compilations_over_100_lengths(name, compilations):
    for n in LENGTHS:
        OPS[name](n)
    counts = {kernel: compilations.count(kernel) for kernel in set(compilations)}
    # at most for a length of 1, for multiples of 16 and for others
    assert bool(counts) != (name in WITHOUT_KERNELS)
    assert max(counts.values(), default=0) <= 3 and len(compilations) <= 12, counts


@pytest.mark.skipif(HAS_GPU, reason="runs on any Hopper GPU by itself, in the test above")
@pytest.mark.parametrize("name", ["linear_logprobs", "linear_token_loss"])
def test_a_handful_of_compilations_of_the_fused_kernels(name, compilations, monkeypatch):
    module = importlib.import_module("rlbench_kernels.linear_logprobs_fused_triton")
    monkeypatch.setattr(module, "can_fuse", lambda hidden, head: head.lora is None)
    for n in LENGTHS:
        OPS[name](n)
    counts = {kernel: compilations.count(kernel) for kernel in set(compilations)}
    assert "_score_tiles" in counts and max(counts.values()) <= 3 and len(compilations) <= 12, counts


def test_a_length_that_is_compiled_in_is_found(compilations):
    def store(x, n: triton.language.constexpr):
        triton.language.store(x, n)

    kernel = jit.JITFunction(store)
    for n in LENGTHS[:20]:
        kernel[(1,)](torch.zeros(1, device=DEVICE), n)
    assert len(compilations) == 20
