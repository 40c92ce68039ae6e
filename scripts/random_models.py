"""Models of real shapes with random weights, in a folder, made on the GPU in seconds: bfloat16 or NF4."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
        "sliding_window": 4096, "tie_word_embeddings": True,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        "sliding_window": 512, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
_LIMIT = 131_072  # positions


def num_weights(shape: str) -> int:
    """Numbers in all matrices that a token passes through: linear layers and the head."""
    s = SHAPES[shape]
    dim = s.get("head_dim", s["hidden_size"] // s["num_attention_heads"])
    query, key = s["num_attention_heads"] * dim, s["num_key_value_heads"] * dim
    layer = s["hidden_size"] * (2 * query + 2 * key + 3 * s["intermediate_size"])
    return s["num_hidden_layers"] * layer + s["vocab_size"] * s["hidden_size"]


def random_model(shape: str, quantization: str) -> str:
    """The model's folder; made if it is not there. Must run in a process of its own if memory is measured after it.

    Args:
        shape: a key of `SHAPES`.
        quantization: none; nf4: a checkpoint in bitsandbytes' format with double quantisation; fp8: the one of none,
            which is quantised while it is loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = "nf4" if quantization == "nf4" else "none"
    folder = Path(tempfile.gettempdir()) / "rlbench-random-models" / f"{shape}-{kept}"
    if (folder / "tokenizer.json").is_file():
        return str(folder)
    options = dict(SHAPES[shape])
    config = AutoConfig.for_model(options.pop("model_type"), **options, max_position_embeddings=_LIMIT)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    torch.manual_seed(0)
    tensors = dict(_tensors(model, is_nf4=quantization == "nf4"))
    if quantization == "nf4":
        config.quantization_config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, tensors)
    config.save_pretrained(folder)
    _save_tokenizer(folder, shape)
    return str(folder)


def text_of(shape: str, numbers: Sequence[int]) -> str:
    """As many tokens of the made tokenizer as there are numbers."""
    if _is_byte_level(shape):
        return "".join(chr(ord("a") + number % 26) for number in numbers)
    return " ".join(f"w{3 + number % 997}" for number in numbers)


def _tensors(model: Any, *, is_nf4: bool) -> Any:
    """(name, tensor on the host) of every parameter."""
    import torch

    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            fill = torch.zeros if model.config.model_type.startswith("gemma") else torch.ones  # Gemma adds 1
            yield name, fill(parameter.shape, dtype=torch.bfloat16)
            continue
        values = (torch.randn(parameter.shape, device="cuda") * 0.02).bfloat16()
        if is_nf4 and name in linears and name != "lm_head.weight":
            from bitsandbytes.functional import quantize_4bit

            packed, state = quantize_4bit(values, quant_type="nf4", compress_statistics=True)
            yield name, packed.cpu()
            for key, tensor in state.as_dict(packed=True).items():
                yield f"{name}.{key}", tensor.cpu()
        else:
            yield name, values.cpu()


def _save(folder: Path, tensors: dict[str, Any]) -> None:
    """In shards, as transformers does."""
    from safetensors.torch import save_file

    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size > 4 * 2**30 and name.endswith(".weight"):
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    index: dict[str, Any] = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": {}}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _is_byte_level(shape: str) -> bool:
    """Whether transformers reads any tokenizer of this family as byte-level BPE."""
    return SHAPES[shape]["model_type"].startswith("qwen")


def _save_tokenizer(folder: Path, shape: str) -> None:
    """What peers ask of a folder before they load it: words w3 to w999, or bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    if _is_byte_level(shape):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(special | {letter: 3 + i for i, letter in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.WordLevel(special | {f"w{i}": i for i in range(3, 1000)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=_LIMIT
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
