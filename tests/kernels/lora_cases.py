"""LoRA layers of small sizes, their float64 twins, and what holds for them with dropout and without."""

import torch
import torch.nn.functional as F

from rlbench_kernels import Fp8Weight, Lora, dequantize_nf4, lora_mlp, lora_qkv, quantize_fp8, quantize_nf4
from rlbench_kernels.lora_dropout import keep_mask
from rlbench_kernels.lora_matmuls import FORMS

KINDS = ("dense", "nf4", "fp8")
ALL_FORMS = ("auto", *FORMS)
# relative Frobenius error against float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
DEPTH, INNER = 64, 128
MLP_SIZES = ((INNER, DEPTH), (INNER, DEPTH), (DEPTH, INNER))
WITHOUT_DROPOUT = (None, None, None)
OPTIONS = [{"values": False}, {"overwrite": True}, {"values": False, "overwrite": True}]  # that keep the gradients


def random(*shape, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def base(rows, depth, *, kind, dtype, seed=0):
    dense = random(rows, depth, dtype=torch.float32, scale=depth**-0.5, seed=seed)
    if kind == "nf4":
        return quantize_nf4(dense.bfloat16())
    return quantize_fp8(dense.bfloat16()) if kind == "fp8" else dense.to(dtype)


def mlp_bases(kind, dtype):
    return [base(*size, kind=kind, dtype=dtype, seed=i) for i, size in enumerate(MLP_SIZES)]


def adapter(rows, depth, rank=4, scaling=0.7, seed=0):
    """Master weights: float64 below, cast by the caller."""
    a = random(rank, depth, scale=depth**-0.5, seed=seed).requires_grad_()
    return Lora(a, random(rows, rank, seed=seed + 1).requires_grad_(), scaling)


def to(lora, dtype):
    if lora is None:
        return None
    return Lora(*(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in lora[:2]), lora.scaling)


def exact_base(weight):
    if isinstance(weight, Fp8Weight):
        return weight.codes.double() * weight.scale.double()
    return (weight if isinstance(weight, torch.Tensor) else dequantize_nf4(weight, torch.empty(weight.shape))).double()


def exact_projection(x, weight, lora, bias=None, dropout=None):
    """As PEFT: the base sees x itself, dropped or not."""
    y = F.linear(x, exact_base(weight).to(x.device), None if bias is None else bias.double())
    if lora is None:
        return y
    if dropout is not None:
        x = x * keep_mask(x.flatten(0, -2).shape, dropout, x.device).view(x.shape) / (1 - dropout.p)
    return y + lora.scaling * ((x @ lora.a.double().T) @ lora.b.double().T)


def exact_mlp(x, weights, loras, activation="silu", dropouts=WITHOUT_DROPOUT):
    act = F.silu if activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
    gate, up = (exact_projection(x, weights[i], loras[i], dropout=dropouts[i]) for i in (0, 1))
    return exact_projection(act(gate) * up, weights[2], loras[2], dropout=dropouts[2])


def error(actual, exact):
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


def check(results, exact, leaves, exact_leaves, tolerance):
    """Values, and the gradients of a weighted sum of all results."""
    for result, value in zip(results, exact, strict=True):
        assert result.shape == value.shape and error(result, value) < tolerance
    weights = [random(*value.shape, seed=i) for i, value in enumerate(exact)]
    loss = sum((r * w.to(r)).sum() for r, w in zip(results, weights, strict=True))
    exact_loss = sum((r * w.to(r)).sum() for r, w in zip(exact, weights, strict=True))
    grads = torch.autograd.grad(loss, leaves)
    for leaf, grad, value in zip(leaves, grads, torch.autograd.grad(exact_loss, exact_leaves), strict=True):
        assert grad.dtype == leaf.dtype and error(grad, value) < tolerance


def leaves_of(x, loras):
    return [x, *(t for lora in loras if lora is not None for t in lora[:2])]


def check_projections(dtype, form, kind, *, absent=None, dropouts=WITHOUT_DROPOUT):
    """`lora_qkv` against float64, values and gradients; `absent` is the projection without adapter."""
    sizes, ranks = (96, 32, 32), (4, 3, 8)
    bases = [base(o, DEPTH, kind=kind, dtype=dtype, seed=i) for i, o in enumerate(sizes)]
    biases = [None, random(32, dtype=dtype), None]
    x, exact_x, loras, exact_loras = _leaves([(o, DEPTH) for o in sizes], ranks, dtype, absent)
    results = lora_qkv(x, bases, loras, biases, dropouts=dropouts, form=form)
    parts = zip(bases, exact_loras, biases, dropouts, strict=True)
    exact = [exact_projection(exact_x, *part) for part in parts]
    check(results, exact, leaves_of(x, loras), leaves_of(exact_x, exact_loras), TOLERANCE[dtype])


def check_mlp(dtype, form, kind, *, activation="silu", absent=None, dropouts=WITHOUT_DROPOUT):
    """`lora_mlp`, as `check_projections`."""
    weights = mlp_bases(kind, dtype)
    x, exact_x, loras, exact_loras = _leaves(MLP_SIZES, (4, 3, 8), dtype, absent)
    y = lora_mlp(x, *weights, loras, activation, dropouts=dropouts, form=form)
    exact = exact_mlp(exact_x, weights, exact_loras, activation, dropouts)
    check([y], [exact], leaves_of(x, loras), leaves_of(exact_x, exact_loras), TOLERANCE[dtype])


def check_finite_differences(form, call_also, dropouts=WITHOUT_DROPOUT):
    """Of `lora_qkv`, `lora_mlp` and `call_also(x)`."""
    sizes = ((6, 5), (6, 5), (5, 6))
    weights = [base(*size, kind="dense", dtype=torch.float64, seed=i) for i, size in enumerate(sizes)]
    loras = [adapter(*size, rank, seed=i) for i, (size, rank) in enumerate(zip(sizes, (2, 3, 2), strict=True))]

    def call(x, *tensors):
        parts = [Lora(a, b, 0.7) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        return (
            *lora_qkv(x, weights[:2], parts[:2], dropouts=dropouts[:2], form=form),
            lora_mlp(x, *weights, parts, dropouts=dropouts, form=form),
            *call_also(x),
        )

    x = random(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(call, leaves_of(x, loras))


def check_same_gradients(form, kind, options, *, absent=None, dropouts=WITHOUT_DROPOUT):
    """Those with `options` are those of the plain call, bit for bit."""
    weights = mlp_bases(kind, torch.float32)
    loras = [None if i == absent else to(adapter(*s, 3, seed=i), torch.float32) for i, s in enumerate(MLP_SIZES)]
    x = random(2, 5, DEPTH, dtype=torch.float32).requires_grad_()

    def mlp(**options):
        return [lora_mlp(x, *weights, loras, dropouts=dropouts, form=form, **options)]

    def projections(**options):
        return lora_qkv(x, weights[:2], loras[:2], dropouts=dropouts[:2], form=form, **options)

    has_values = options.get("values", True)
    _check_same(mlp(), mlp(**options), leaves_of(x, loras), has_values=has_values)
    if "values" in options:
        _check_same(projections(), projections(values=False), leaves_of(x, loras[:2]), has_values=False)


def _check_same(results, again, leaves, *, has_values):
    grads = [random(*y.shape, dtype=torch.float32, seed=i) for i, y in enumerate(results)]
    for y, other in zip(results, again, strict=True):
        assert other.shape == y.shape and (not has_values or torch.equal(other, y))
    expected = torch.autograd.grad(results, leaves, grads)
    for grad, exact in zip(torch.autograd.grad(again, leaves, grads), expected, strict=True):
        assert torch.equal(grad, exact)


def peft_layer(library, dtype=torch.float32, **options):
    """PEFT's layer around a linear layer [48, DEPTH] with bias, and its A and B, not zero."""
    config = library.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], **options)
    (layer,) = library.inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(DEPTH, 48))).to(dtype)
    layer.base_layer.requires_grad_(False)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    return layer, a, b


def check_same(y, other, leaves, tolerance):
    """Values and gradients of one weighted sum."""
    assert error(y, other) < tolerance
    weights = random(*y.shape, dtype=y.dtype)
    mine, theirs = (torch.autograd.grad((result * weights).sum(), leaves) for result in (y, other))
    assert all(error(m, t) < tolerance for m, t in zip(mine, theirs, strict=True))


def saved_bytes(call):
    """Bytes of the distinct storages that the backward pass keeps."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storages.values())


def _leaves(sizes, ranks, dtype, absent):
    """x and its float64 twin [2, 5, DEPTH], adapters in the master dtype and theirs in float64."""
    exact_loras = [
        None if i == absent else adapter(*size, rank, seed=i)
        for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
    ]
    master = torch.float64 if dtype == torch.float64 else torch.float32
    exact_x = random(2, 5, DEPTH).to(dtype).double().requires_grad_()
    x = exact_x.detach().to(dtype).requires_grad_()
    return x, exact_x, [to(lora, master) for lora in exact_loras], exact_loras
