"""The run's engine without a trainer, and which step's weights it holds, proved before it answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.commands.chat_weights import read_weights_of, without_adapter
from rlbench.commands.run_step import Found, policy_config
from rlbench.config.full_training import FULL
from rlbench.config.recorded import recorded_config
from rlbench.config.schema import STAGES, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlbench.build import Inputs
    from rlbench.engine.interface import Adapter, Engine, Weights
    from rlbench.records import Completion, SamplingParams

_BLOCK_TOKENS = 32  # of keys and values that vLLM hands out together; 16 on a GPU


class ChatPolicy:
    """An engine, and the weights that it holds.

    Attributes:
        label: of these weights: "step 12" or "base".
        fingerprint: of these weights, as the engine reports it.
        context: most tokens of a conversation and its answer.
    """

    def __init__(self, inputs: Inputs) -> None:
        """
        Args:
            inputs: from `prepare_chat`.

        Raises:
            ValueError: the engine cannot be started with these settings.
        """
        import torch

        config = self._config = inputs.config
        self._inputs = inputs
        self._device = "cuda" if config.hardware.profile == "gpu" else "cpu"
        if self._device == "cpu":
            torch.set_num_threads(config.hardware.num_threads or 1)
        self.context = answer_context(config, inputs.context_tokens, text_config_of(inputs.model.folder))
        self._base: PreTrainedModel | None = None  # that the engine computes with; None: it has its own
        self.engine = self._vllm() if config.engine.kind == "vllm" else self._hf()
        self.label, self.fingerprint = "", self.engine.adapter_fingerprint
        self._shown: Found | None = None
        self._version = 0

    def use(self, found: Found) -> None:
        """Answer with these weights from now on.

        Raises:
            ValueError: the weights are not those that the run recorded, or not what the engine then holds.
            EngineDeadError: the engine could not take them.
        """
        if found == self._shown:
            return
        from rlbench.weight_sync import sync

        weights = self._weights(found)
        self._shown = None  # what the engine holds if the next lines are interrupted is not known
        if weights is not None:
            self._version += 1
            expected = sync(weights, self.engine, self._version)
            if self.engine.adapter_fingerprint != expected or (problem := self._difference(weights)):
                raise ValueError(f"the engine does not hold the weights of {found.label}: {problem}")
        self._shown, self.label, self.fingerprint = found, found.label, self.engine.adapter_fingerprint

    def answer(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams, seed: int) -> Completion:
        """
        Raises:
            EngineDeadError: the engine failed.
        """
        from rlbench.engine.interface import engine_call

        with engine_call(self.engine, "generation"):
            (completion,) = self.engine.generate([prompt_token_ids], sampling, [seed])
        assert completion.adapter_fingerprint == self.fingerprint
        return completion

    def frozen_base(self) -> PreTrainedModel:
        """The base for reward models: the engine's own tensors where they stay as they are."""
        if self._base is not None and self._config.training.parameters != FULL:
            return self._base
        return self._load_base()

    def close(self) -> None:
        self.engine.close()

    def _weights(self, found: Found) -> Adapter | Weights | None:
        """What the engine is to hold; None: what it holds is the base already."""
        from rlbench.engine.interface import BASE_FINGERPRINT

        if found.checkpoint is not None:
            return read_weights_of(found.checkpoint, self._config, self._device)
        if self.engine.adapter_fingerprint == BASE_FINGERPRINT:
            return None
        if self._config.training.parameters == FULL:
            from rlbench.models.weights import Weights

            return Weights(tensors={n: p.detach() for n, p in self._load_base().named_parameters()})
        return without_adapter(self.engine.held_adapter())

    def _difference(self, weights: Adapter | Weights) -> str:
        """What the engine's tensors are not, bit for bit; "" if they are what was handed over."""
        import torch

        from rlbench.checks.weight_copies import differing_layers, explain
        from rlbench.engine.interface import Adapter

        if isinstance(weights, Adapter):
            held = self.engine.held_adapter()
            layers = differing_layers(held, weights)
            return explain(held, weights, layers) if layers else ""
        own = self.engine.held_weights()
        wrong = [name for name, held in own.items() if not torch.equal(held, weights.tensors[name].to(held))]
        return f"{len(wrong)} of {len(own)} tensors differ, the first is {wrong[0]}" if wrong else ""

    def _load_base(self) -> PreTrainedModel:
        import torch

        from rlbench.models.base import load_base

        model = self._config.model
        return load_base(
            str(self._inputs.model.folder),
            dtype=getattr(torch, model.dtype),
            device=self._device,
            quantization=model.quantization,
        )

    def _hf(self) -> Engine:
        from rlbench.engine.hf_engine import HfEngine

        self._base = self._load_base()
        return HfEngine(self._base, max_num_seqs=1, tokenizer=self._inputs.tokenizer)

    def _vllm(self) -> Engine:
        from rlbench.build import start_vllm

        return start_vllm(self._config, str(self._inputs.model.folder), self._device, self.context, 1)


def answering_config(run_folder: Path, overrides: list[str]) -> RunConfig:
    """The settings with which a run's policy answers, of a run without an engine too.

    Raises:
        ValueError: the run trained no policy, or an override cannot be applied.
    """
    recorded = policy_config(run_folder)
    added = []
    if recorded.engine.kind == "recorded":  # its own run sampled nothing
        added = ["engine.kind=auto", "engine.recorded_from=null", "engine.share=null"]
    if recorded.stage == "rl":
        return recorded_config(run_folder, [*added, *overrides])
    # A run on given completions has neither engine nor sampling; stage=rl reads those that are asked for.
    return recorded_config(run_folder, ["stage=rl", "lora.dropout=0", *_defaults_of_unread(recorded), *overrides])


def _defaults_of_unread(recorded: RunConfig) -> list[str]:
    """Overrides that give the sections which stage=rl does not read their defaults."""
    import json

    from rlbench.config.compose import leaves

    default, found = RunConfig(), []
    for section in STAGES["rl"]:
        own, theirs = (dict(leaves(_plain(config, section), section)) for config in (default, recorded))
        found += [f"{key}={json.dumps(value)}" for key, value in own.items() if theirs.get(key) != value]
    return found


def _plain(config: RunConfig, section: str) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(getattr(config, section))


def prepare_chat(config: RunConfig) -> Inputs:
    """What is known before weights are loaded: settings, model, tokenizer. No rows are read.

    Args:
        config: changed in place: what it leaves open is derived.

    Raises:
        ValueError: anything a user can get wrong.
    """
    from transformers import AutoTokenizer

    from rlbench.build import Inputs
    from rlbench.config.derive import derive
    from rlbench.data.prompts import PromptSet
    from rlbench.models.device import hardware_facts
    from rlbench.models.device_cap import set_device_cap
    from rlbench.models.source import check_model_path, resolve_model

    if config.model.path is not None:
        check_model_path(config.model.path)
    facts = hardware_facts(config.hardware.profile, config.hardware.memory_gib)
    if facts.device == "cuda":
        set_device_cap(config.hardware.memory_gib)
    derived = derive(config, facts)
    model = resolve_model(config.model)
    tokenizer = AutoTokenizer.from_pretrained(str(model.folder), local_files_only=True)
    text_config = text_config_of(model.folder)
    eos = text_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, (list, tuple)) else [eos])} - {None}
    return Inputs(
        config=config,
        facts=facts,
        derived=derived,
        rows={},
        model=model,
        tokenizer=tokenizer,
        context_tokens=int(text_config.max_position_embeddings),
        train=PromptSet(prompts=(), num_too_long=0),
        evaluation=None,
        stop_token_ids=tuple(sorted(stops | set(config.sampling.stop_token_ids))),
    )


def answer_context(config: RunConfig, context_tokens: int, text_config: Any) -> int:
    """Most tokens of a conversation with its answer: the model's, and with vLLM what engine.kv_cache_gib holds.

    Raises:
        ValueError: an answer leaves no room for a prompt.
    """
    limit, reason = context_tokens, "the model's context"
    if config.engine.kind == "vllm":
        from rlbench.models.fit import kv_token_bytes

        gib = config.engine.kv_cache_gib or 1.0
        num_blocks = int(gib * 2**30) // (_BLOCK_TOKENS * kv_token_bytes(text_config, config)) - 1
        if num_blocks * _BLOCK_TOKENS < limit:
            limit, reason = num_blocks * _BLOCK_TOKENS, f"what engine.kv_cache_gib={gib:g} holds"
    if config.sampling.max_tokens >= limit:
        raise ValueError(
            f"sampling.max_tokens is {config.sampling.max_tokens}, but {reason} is {limit} tokens, prompt included; "
            "expected a smaller sampling.max_tokens"
        )
    return limit


def answer_sampling(inputs: Inputs, *, is_greedy: bool) -> SamplingParams:
    """The run's sampling; greedy where sampling.temperature=0 was asked for."""
    from rlbench.build import training_sampling

    sampling = training_sampling(inputs)
    return replace(sampling, temperature=0.0) if is_greedy else sampling


def text_config_of(folder: Path) -> Any:
    """Of a transformers model's folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), local_files_only=True).get_text_config()
