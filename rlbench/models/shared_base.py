"""The trainer's model over the engine's own weight tensors: one copy of the base on the device.

The transformers model is built on the meta device, so it owns no weights; then every parameter becomes a view of the
tensor that the engine already holds. vLLM keeps q, k and v as rows of one matrix, gate and up of another: `_FUSED` is
the table of those names. FP8 matrices it keeps transposed, [in, out] over rows of `in` codes, with one scale a row
beside them, and on a GPU pads both sides to multiples of 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlbench.models.base import check_text_model
from rlbench.models.fp8_linear import Fp8Linear
from rlbench.models.nf4_linear import Nf4Linear
from rlbench_kernels import FP8, Fp8Weight, Nf4Weight

SHARED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
_FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_PADDED = ("embed_tokens", "lm_head")  # engines may add rows to these


@dataclass(frozen=True, slots=True)
class EngineWeight:
    """One parameter of the engine's model.

    Attributes:
        tensor: dense, of any shape; or NF4 bytes, uint8 [n, 1], of several matrices one after the other; or FP8 codes,
            float8_e4m3fn [in, out], whose scales are the weight NAME_scale.
        nf4_parts: for NF4, (bytes, bitsandbytes QuantState) of each matrix in `tensor`, in order; else empty.
    """

    tensor: Tensor
    nf4_parts: tuple[tuple[Tensor, Any], ...] = ()


def bind_base(folder: str, weights: Mapping[str, EngineWeight], *, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen transformers model whose parameters are the engine's tensors.

    Args:
        folder: with the model's config.json.
        weights: the engine's parameters by name, e.g. "model.layers.0.self_attn.qkv_proj.weight".
        dtype: of the dense weights.

    Raises:
        ValueError: an architecture without a table of names, or weights that do not fit the config.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_text_model(config, folder)
    if config.model_type not in SHARED_FAMILIES:
        raise ValueError(
            f"model.path: the weights of a {config.model_type} model cannot be shared with vLLM yet, expected one of "
            f"{', '.join(SHARED_FAMILIES)}; with engine.share=false the trainer loads a copy of its own"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            _bind_linear(model, name, module, weights)
        else:
            _bind_plain(module, name, weights)
    model.tie_weights()  # a tied lm_head is no parameter of the engine's
    _make_buffers(model, config, next(iter(weights.values())).tensor.device)
    _check_complete(model, dtype)
    return model.requires_grad_(False).eval()


def _bind_linear(model: PreTrainedModel, name: str, linear: nn.Linear, weights: Mapping[str, EngineWeight]) -> None:
    found, part, rows = _locate(model, name, weights)
    if found is None:
        return
    bias_name = _engine_name(name, weights, "bias")
    bias = None
    if linear.bias is not None:
        if bias_name is None:
            raise ValueError(f"model.path: the engine has no bias for {name}, which the model's config asks for")
        bias = weights[bias_name].tensor[rows]
    if found.nf4_parts:
        packed, quant_state = found.nf4_parts[part]
        if tuple(quant_state.shape) != tuple(linear.weight.shape):
            raise ValueError(_misfit(name, quant_state.shape, linear.weight.shape))
        model.set_submodule(name, Nf4Linear(Nf4Weight.from_quant_state(packed, quant_state), bias))
        return
    scale = weights.get(f"{_engine_name(name, weights, 'weight')}_scale")
    if scale is not None or found.tensor.dtype.itemsize == 1:
        model.set_submodule(name, Fp8Linear(_fp8_rows(name, found.tensor, scale, rows, linear), bias))
        return
    linear.weight = _parameter(name, found.tensor[rows], linear.weight)
    if bias is not None:
        linear.bias = _parameter(f"{name}.bias", bias, linear.bias)


def _fp8_rows(name: str, codes: Tensor, scale: EngineWeight | None, rows: slice, linear: nn.Linear) -> Fp8Weight:
    """Rows of vLLM's FP8 matrix, codes [in, out], as views.

    Raises:
        ValueError: another layout, as that of vLLM's kernels for GPUs that do not multiply FP8.
    """
    scales = None if scale is None else scale.tensor
    is_known = codes.dtype == FP8 and codes.ndim == 2 and codes.stride(0) == 1
    if not is_known or scales is None or scales.dtype != torch.float32 or scales.shape != (codes.shape[1], 1):
        found = f"{codes.dtype} {tuple(codes.shape)} with strides {codes.stride()}"
        raise ValueError(
            f"model.quantization is fp8, but the engine keeps {name} as {found} and scales "
            f"{None if scales is None else tuple(scales.shape)}, expected float8_e4m3fn [in, out] with contiguous "
            "columns and one scale a column; with engine.share=false the trainer quantises a copy of its own"
        )
    num_columns = linear.in_features
    if codes.shape[0] < num_columns or codes.shape[1] < rows.stop:
        raise ValueError(_misfit(name, codes.T[rows].shape, linear.weight.shape))
    return Fp8Weight(codes.T[rows, :num_columns], scales[rows], linear.weight.dtype)


def _bind_plain(module: nn.Module, name: str, weights: Mapping[str, EngineWeight]) -> None:
    """Embeddings and norms."""
    for leaf, parameter in module.named_parameters(recurse=False):
        weight = weights.get(f"{name}.{leaf}")
        if weight is not None:
            tensor = weight.tensor[: len(parameter)] if name.rsplit(".", 1)[-1] in _PADDED else weight.tensor
            module.register_parameter(leaf, _parameter(f"{name}.{leaf}", tensor, parameter))


def _locate(
    model: PreTrainedModel, name: str, weights: Mapping[str, EngineWeight]
) -> tuple[EngineWeight | None, int, slice]:
    """The engine's weight that holds linear layer `name`, the layer's place among its parts, and its rows."""
    key = _engine_name(name, weights, "weight")
    parent, _, leaf = name.rpartition(".")
    num_rows = _num_rows(model, name)
    if key is None:
        return None, 0, slice(0, num_rows)
    if key == f"{name}.weight":
        return weights[key], 0, slice(0, num_rows)
    _, parts = _FUSED[leaf]
    sizes = [_num_rows(model, f"{parent}.{part}") for part in parts]
    place = parts.index(leaf)
    start = sum(sizes[:place])
    return weights[key], place, slice(start, start + sizes[place])


def _num_rows(model: PreTrainedModel, name: str) -> int:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear.out_features


def _engine_name(name: str, weights: Mapping[str, EngineWeight], kind: str) -> str | None:
    parent, _, leaf = name.rpartition(".")
    fused = f"{parent}.{_FUSED[leaf][0]}.{kind}" if leaf in _FUSED else None
    return next((key for key in (f"{name}.{kind}", fused) if key in weights), None)


def _parameter(name: str, tensor: Tensor, meta: Tensor) -> nn.Parameter:
    if tensor.shape != meta.shape:
        raise ValueError(_misfit(name, tensor.shape, meta.shape))
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _misfit(name: str, found: Any, expected: Any) -> str:
    return f"model.path: the engine's weight for {name} has shape {tuple(found)}, the config asks for {tuple(expected)}"


def _make_buffers(model: PreTrainedModel, config: Any, device: torch.device) -> None:
    """Rotary frequencies are computed from the config, not stored: make those modules anew on the device.

    So is the scale of Gemma's embeddings, which is rounded to their dtype where it is used.
    """
    for name, module in list(model.named_modules()):
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            rotary: Any = type(module)
            with torch.device(device):
                model.set_submodule(name, rotary(config.get_text_config()))


def _check_complete(model: PreTrainedModel, dtype: torch.dtype) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = [name for name, tensor in tensors.items() if tensor.is_meta]
    if missing:
        raise ValueError(
            f"model.path: the engine holds no weight for {missing[0]} and {len(missing) - 1} more; with "
            f"engine.share=false the trainer loads a copy of its own"
        )
    scales = [module.scale for module in model.modules() if isinstance(module, Fp8Linear)]
    dense = {t for t in model.parameters() if t.is_floating_point()} - set(scales)
    wrong = {t.dtype for t in dense} - {dtype}
    if wrong:
        raise ValueError(f"model.dtype is {dtype}, but the engine holds weights in {', '.join(map(str, wrong))}")
