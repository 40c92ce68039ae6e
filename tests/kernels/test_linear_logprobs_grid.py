"""`linear_logprobs` and `linear_token_loss` in pairwise combinations of all their arguments, against float64.

The reference on the CPU, both Triton paths under the interpreter, and at full size on the GPU.
"""

from itertools import combinations, product

import pytest
import torch

import rlbench_kernels.linear_logprobs_reference as reference
from rlbench_kernels import Lora, linear_logprobs, linear_token_loss, support_thresholds
from tests.kernels.interpreter import IS_INTERPRETED, on_cpu, run_interpreted
from tests.kernels.pairwise import pairwise

HAS_GPU = torch.cuda.is_available() and not IS_INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"
SUPPORTS = {"top_p": {"top_p": 0.8}, "top_k": {"top_k": 3}, "min_p and top_p": {"min_p": 0.05, "top_p": 0.9}}
MASKS = {
    "none": lambda n: torch.ones(n, dtype=torch.bool),
    "every second": lambda n: torch.arange(n) % 2 == 0,
    "first half": lambda n: torch.arange(n) >= n // 2,
}
FACTORS = {
    "v": (7, 49152, 128256) if HAS_GPU else (7, 300),
    "dtype": (torch.float32, torch.bfloat16),
    "lora": (None, 8, 5),
    "support": (None, *SUPPORTS),
    "temperature": (1.0, 0.7, "rows"),
    "softcap": (None, 3.0),
    "bias": (None, "frozen", "trained"),
    "is_weight_trained": (False, True),
    "entropy_coef": (0.0, 0.3),
    "mask": tuple(MASKS),
    "masked_value": (None, -torch.inf, torch.nan),
    "n": (513, 1) if HAS_GPU else (11, 1),
}
CASES = pairwise(FACTORS)
FUSED_CASES = pairwise({**FACTORS, "lora": (None,), "dtype": (torch.bfloat16 if HAS_GPU else torch.float32,)})
# relative Frobenius error against float64; bfloat16 logits are rounded on CPU, the interpreter truncates to bfloat16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3 if HAS_GPU else 2e-2}
gpu = pytest.mark.gpu
triton_here = pytest.mark.skipif(not IS_INTERPRETED and not HAS_GPU, reason="needs a CUDA device or TRITON_INTERPRET=1")


def name_of(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What is not written stays nan."""

    def poisoning(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def tiles(monkeypatch):
    """Logits through memory, in tiles."""
    from rlbench_kernels import linear_logprobs_fused_triton, linear_logprobs_support_triton, linear_logprobs_triton

    monkeypatch.setenv("RLBENCH_KERNELS", "triton")
    monkeypatch.setattr(linear_logprobs_fused_triton, "can_fuse", lambda hidden, head: False)
    if IS_INTERPRETED:
        monkeypatch.setattr(linear_logprobs_triton, "_MAX_TILE", 128)
        monkeypatch.setattr(linear_logprobs_triton, "_MAX_ROWS", 8)
        monkeypatch.setattr(linear_logprobs_triton, "multiply", multiply_on_cpu)
        monkeypatch.setattr(linear_logprobs_support_triton, "_BLOCK", 128)


def multiply_on_cpu(left, right, out, *, is_added=False):
    """`multiply`; torch has no `out_dtype` on CPU."""
    product = left.float() @ right.float()
    out.copy_(out + product if is_added else product)


@pytest.fixture
def fused(monkeypatch):
    """On Hopper in bfloat16 by itself; in float32 under the interpreter, on small tiles."""
    from rlbench_kernels import linear_logprobs_fused_triton as module

    monkeypatch.setenv("RLBENCH_KERNELS", "triton")
    if IS_INTERPRETED:
        monkeypatch.setattr(module, "can_fuse", lambda hidden, head: head.lora is None)
        for name, value in {"_ROWS": 8, "_BLOCK_M": 16, "_BLOCK_N": 64, "_BLOCK_K": 16}.items():
            monkeypatch.setattr(module, name, value)


class Problem:
    """A case's tensors, and what float64 says."""

    def __init__(self, case, depth=24):
        self.case, n, v = case, case["n"], case["v"]
        self.dtype = case["dtype"]
        self.generator = torch.Generator().manual_seed(3)
        self.mask = MASKS[case["mask"]](n).to(DEVICE)
        hidden = self.random(n, depth)
        if case["masked_value"] is not None:
            hidden = torch.where(self.mask[:, None], hidden, case["masked_value"])
        self.hidden = hidden.requires_grad_()
        self.weight = self.random(v, depth).requires_grad_(case["is_weight_trained"])
        self.targets = torch.randint(v, (n,), generator=self.generator).to(DEVICE)
        self.options = {"temperature": case["temperature"], "softcap": case["softcap"]}
        if case["temperature"] == "rows":
            self.options["temperature"] = torch.linspace(0.5, 1.5, n, device=DEVICE)
        if case["bias"]:
            self.options["bias"] = self.random(v).requires_grad_(case["bias"] == "trained")
        if case["lora"]:
            # float32 masters of values that bfloat16 holds
            a, b = (self.random(*shape).float() for shape in ((case["lora"], depth), (v, case["lora"])))
            self.options["lora"] = Lora(a.requires_grad_(), b.requires_grad_(), 0.25)
        if case["support"]:
            self.options["support"] = support_thresholds(
                self.hidden, self.weight, **self.options, **SUPPORTS[case["support"]]
            )
        self.g = torch.linspace(-1, 2, n, device=DEVICE)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    @property
    def trained(self):
        bias, lora = self.options.get("bias"), self.options.get("lora")
        tensors = [self.hidden, self.weight, bias, *(lora[:2] if lora else ())]
        return [t for t in tensors if t is not None and t.requires_grad]

    def loss(self, logprobs, entropy, columns):
        """In the dtype of the values; masked rows are left out."""
        value = columns["g"] * (logprobs + self.case["entropy_coef"] * entropy)
        return torch.where(columns["mask"], value, 0.0).sum(), {"count": columns["mask"].sum()}

    def exact(self):
        """logprobs, entropy and gradients of the unmasked rows in float64."""
        rows, leaves = self.mask, {id(t): t.detach().double().requires_grad_() for t in self.trained}

        def wide(tensor):
            return leaves.get(id(tensor), tensor.detach().double())

        logits = wide(self.hidden)[rows] @ wide(self.weight).T
        if self.dtype == torch.bfloat16 and not HAS_GPU and not IS_INTERPRETED:
            logits = logits + (logits.to(torch.bfloat16).double() - logits).detach()
        lora, bias, softcap = self.options.get("lora"), self.options.get("bias"), self.options["softcap"]
        if lora:
            logits = logits + lora.scaling * (wide(self.hidden)[rows] @ wide(lora.a).T) @ wide(lora.b).T
        if bias is not None:
            logits = logits + wide(bias)
        scores = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        temperature = self.options["temperature"]
        scores = scores / (temperature[rows, None].double() if isinstance(temperature, torch.Tensor) else temperature)
        targets = self.targets[rows, None]
        if self.case["support"]:
            is_outside = (scores < self.options["support"][rows, None]).scatter(1, targets, False)
            scores = scores.masked_fill(is_outside, -torch.inf)
        log_probs = torch.log_softmax(scores, -1)
        entropy = -torch.where(log_probs.exp() > 0, log_probs.exp() * log_probs.clamp(min=-1e9), 0.0).sum(-1)
        logprobs = log_probs.gather(1, targets)[:, 0]
        loss, _ = self.loss(logprobs, entropy, {"g": self.g[rows].double(), "mask": rows[rows]})
        return logprobs.detach(), entropy.detach(), torch.autograd.grad(loss, [leaves[id(t)] for t in self.trained])


def check(case):
    problem = Problem(case)
    columns = {"g": problem.g, "mask": problem.mask}
    arguments = (problem.hidden, problem.weight, problem.targets)
    found = linear_logprobs(*arguments, **problem.options)
    with torch.no_grad():
        without_gradient = linear_logprobs(*arguments, **problem.options)
    loss, metrics, of_loss = linear_token_loss(*arguments, problem.loss, columns, **problem.options)
    grads = [torch.autograd.grad(x, problem.trained) for x in (problem.loss(*found, columns)[0], loss)]

    kept = problem.mask
    exact_logprobs, exact_entropy, exact_grads = problem.exact()
    tolerance = TOLERANCE[problem.dtype]
    if problem.dtype == torch.bfloat16 and case["lora"]:
        tolerance = 2e-2  # hidden A^T is rounded on the way
    is_rounded = problem.dtype == torch.bfloat16 and (DEVICE == "cpu" or case["lora"])
    values_tolerance = tolerance if is_rounded else 2e-5
    assert close(found[0][kept], exact_logprobs, values_tolerance)
    assert close(found[1][kept], exact_entropy, values_tolerance)
    for with_gradient, without in zip((*found, of_loss), (*without_gradient, without_gradient[0]), strict=True):
        assert torch.equal(with_gradient[kept], without[kept])
    assert int(metrics["count"]) == int(kept.sum())
    for of_function in grads:
        assert of_function[0][~kept].eq(0).all()
        for grad, exact in zip(of_function, exact_grads, strict=True):
            assert grad.dtype in (problem.dtype, torch.float32) and grad.isfinite().all()
            assert close(grad, exact, tolerance)


def close(found, exact, tolerance):
    # where the support holds the target alone everything is 0; the absolute part is float32's rounding of a score
    return float((found.detach().double() - exact).norm()) < tolerance * float(exact.norm()) + 2e-5


@pytest.mark.parametrize(("a", "b"), list(combinations(FACTORS, 2)))
def test_every_two_values_meet(a, b):
    met = {(str(case[a]), str(case[b])) for case in CASES}
    assert met == set(product(map(str, FACTORS[a]), map(str, FACTORS[b])))


@pytest.mark.skipif(IS_INTERPRETED or HAS_GPU, reason="the reference runs on the CPU")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference_matches_float64(case, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 4 * case["v"])
    check(case)


@gpu
@triton_here
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tiles_match_float64(case, tiles):
    check(case)


@gpu
@triton_here
@pytest.mark.parametrize("case", FUSED_CASES, ids=name_of)
def test_fused_kernel_matches_float64(case, fused):
    check(case)


@on_cpu
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)
