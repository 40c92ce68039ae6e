"""The frozen base model: loaded once, seen through several module trees that share its tensors."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from rlbench.models.fp8_linear import Fp8Linear
from rlbench.models.nf4_linear import Nf4Linear, join_neighbours
from rlbench.models.quiet import no_progress_bars
from rlbench_kernels import Nf4Weight, quantize_fp8

ModelT = TypeVar("ModelT", bound=nn.Module)
_LOGIT_SCALES = ("logits_scaling", "logit_scale")  # of Granite, of Cohere


def load_base(
    path: str, *, dtype: torch.dtype, device: str | torch.device, quantization: str = "none"
) -> PreTrainedModel:
    """Load a causal language model from a local folder (safetensors), frozen and in evaluation mode.

    Args:
        path: folder with config.json and weights; see `rlbench.models.source` for hub ids and GGUF files.
        dtype: of all weights.
        device: where the weights go.
        quantization: "nf4" quantises all linear layers but the head while they are loaded, with double quantisation;
            a checkpoint that is in NF4 already stays as it is. "fp8" quantises the same layers, one scale a row, on
            `device`, one after the other: the dense ones never lie there together.

    Raises:
        ValueError: if the folder holds no model that transformers can load, or one with another quantization.
    """
    options: dict[str, Any] = {}
    if quantization == "nf4":
        check_bitsandbytes()
        options = {"quantization_config": _nf4_config(dtype), "device_map": {"": device}}
    try:
        found = AutoConfig.from_pretrained(path, local_files_only=True)
        check_text_model(found, path)
        check_quantization(path, found, quantization)
        if getattr(found, "quantization_config", None) is not None:
            options.pop("quantization_config")  # the checkpoint's own holds
        with no_progress_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        if str(error).startswith(("model.quantization", "model.path")):
            raise
        raise ValueError(f"model.path: {path} does not load as a causal language model ({error})") from error
    if quantization == "nf4":
        _keep_bytes(model)
    elif quantization == "fp8":
        _quantise_fp8(model, torch.device(device))
        model.to(device=device)
    else:
        model.to(device=device)
    return model.requires_grad_(False).eval()


def check_bitsandbytes() -> None:
    """
    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "model.quantization is nf4, which needs the package bitsandbytes where no engine quantises; expected it "
            "installed (pip install bitsandbytes), or model.quantization=none"
        )


def check_text_model(config: Any, path: str) -> None:
    """
    Args:
        config: of a transformers model.
        path: its folder, for the message.

    Raises:
        ValueError: it sees images, hears or the like too, as Gemma 3 from 4B on does as it is published; or it scales
            its logits by a number, as Granite and Cohere do, which the trainer's head does not.
    """
    for key in _LOGIT_SCALES:
        scale = getattr(config.get_text_config(), key, None)
        if scale not in (None, 1.0):
            raise ValueError(
                f"model.path: {path} is a {config.model_type} model with {key}={scale}, which the trainer's logprobs "
                "would leave out; expected a model whose logits are its head's alone"
            )
    if config.get_text_config() is not config:
        names = ", ".join(config.architectures or [config.model_type])
        raise ValueError(
            f"model.path: {path} holds {names}, which reads more than text; expected a checkpoint of its text model "
            f"alone, as AutoModelForCausalLM.from_config({type(config.get_text_config()).__name__}(..)) saves it"
        )


def _nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """What vLLM does to a dense checkpoint."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_quantization(path: str, config: Any, wanted: str) -> None:
    """
    Args:
        path: the checkpoint, for the message.
        config: of transformers.
        wanted: model.quantization.

    Raises:
        ValueError: the checkpoint is quantised, and not as wanted. Only NF4 is read.
    """
    found: Any = getattr(config, "quantization_config", None)
    found = found.to_dict() if hasattr(found, "to_dict") else found
    if not found:
        return
    is_nf4 = bool(found.get("load_in_4bit")) and found.get("bnb_4bit_quant_type") == "nf4"
    if not (is_nf4 and wanted == "nf4"):
        kind = "nf4" if is_nf4 else found.get("quant_method", "unknown")
        hint = "expected model.quantization=nf4" if is_nf4 else "expected a checkpoint that is dense or in NF4"
        if wanted == "fp8":
            hint = "expected a dense checkpoint, which is quantised while it is loaded"
        raise ValueError(f"model.quantization is {wanted}, but the checkpoint {path} is quantised ({kind}); {hint}")


def _keep_bytes(model: nn.Module) -> None:
    """Layers of bitsandbytes become ours over the same bytes."""
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            bias = None if module.bias is None else module.bias.data
            quantised = Nf4Weight.from_quant_state(weight.data, weight.quant_state)
            model.set_submodule(name, Nf4Linear(quantised, bias))
            weight.module = None  # bitsandbytes' circle: the bytes would stay after they are joined
    join_neighbours(model)


def _quantise_fp8(model: PreTrainedModel, device: torch.device) -> None:
    """All linear layers but the head become ours, on the device."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            bias = None if module.bias is None else module.bias.data.to(device)
            model.set_submodule(name, Fp8Linear(quantize_fp8(module.weight.data.to(device)), bias))


def share_base(model: ModelT) -> ModelT:
    """A second module tree over the same parameter tensors: no weight byte is copied.

    Modules, buffers and the config are copied, so that one tree can get other attention, adapters or patches than
    the other.
    """
    shared: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)


def storage_bytes(*models: nn.Module) -> int:
    """Bytes of the distinct parameter storages behind the models."""
    storages: dict[int, int] = {}
    for model in models:
        for parameter in model.parameters():
            storage = parameter.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def output_softcap(model: PreTrainedModel) -> float | None:
    """What the logits are capped at, softcap tanh(logit / softcap); None: they are not (all families but Gemma 2)."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def output_weight(model: PreTrainedModel) -> Tensor:
    """Weight [V, D] of the language-model head."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head.weight
