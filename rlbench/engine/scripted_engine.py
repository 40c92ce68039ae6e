"""An engine whose model is a function: slow, simple, right by reading. For tests and for debugging loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlbench.engine.hf_engine import check_prompts, check_sequences, check_unguided
from rlbench.engine.interface import BASE_FINGERPRINT, Adapter, OnFinished, Weights
from rlbench.engine.penalties import Penalties
from rlbench.engine.sampling import counter_uniforms, draw_tokens, plain_logprobs
from rlbench.engine.stop_strings import StopStrings
from rlbench.models.adapter import check_adapter
from rlbench.records import FINISH_LENGTH, FINISH_STOP, Completion, SamplingParams

Logits = Callable[[Sequence[int], Adapter | None], Tensor]


class ScriptedEngine:
    """Engine contract over `logits(token_ids, adapter) -> [L, V]`; row i predicts the token after token_ids[i].

    Args:
        logits: the model; called with a copy of the adapter last synced, or None.
        context: most tokens of prompt and completion together.
        shapes: (out, in) of the layers that can have an adapter; None takes any adapter.
        tokenizer: a fast tokenizer, for stop strings.
    """

    name = "scripted"

    def __init__(
        self,
        logits: Logits,
        context: int,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._logits = logits
        self._tokenizer = tokenizer
        self._context = context
        self._shapes = shapes
        self._adapter: Adapter | None = None
        self.policy_version = 0
        self.adapter_fingerprint = BASE_FINGERPRINT

    def generate(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`."""
        check_unguided(sampling, self.name)
        prompts = check_prompts(prompt_token_ids, seeds, sampling.max_tokens, self._context)
        completions: list[Completion] = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            completions.append(self._complete(prompt, sampling, seed))
            if on_finished is not None:
                on_finished(index, completions[-1])
        return completions

    def score(
        self, prompt_token_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], *, use_adapter: bool = True
    ) -> list[list[float]]:
        """See `Engine.score`."""
        prompts = check_sequences(prompt_token_ids, token_ids, self._context)
        adapter = self._adapter if use_adapter else None
        scores = []
        for prompt, completion in zip(prompts, token_ids, strict=True):
            rows = self._logits([*prompt, *completion], adapter)[len(prompt) - 1 : -1].log_softmax(-1)
            scores.append([float(row[token]) for row, token in zip(rows, completion, strict=True)])
        return scores

    def sync(self, weights: Adapter | Weights, version: int) -> None:
        """See `Engine.sync`.

        Raises:
            ValueError: also for `Weights`: a function has none.
        """
        if isinstance(weights, Weights):
            raise ValueError("a scripted engine has no weights, expected an adapter")
        adapter = weights
        if version < self.policy_version:
            raise ValueError(f"sync to policy_version {version}, but the engine already has {self.policy_version}")
        if self._shapes is not None:
            check_adapter(adapter, self._shapes)
        self._adapter = Adapter(
            lora_a={name: tensor.detach().clone() for name, tensor in adapter.lora_a.items()},
            lora_b={name: tensor.detach().clone() for name, tensor in adapter.lora_b.items()},
            scaling=adapter.scaling,
        )
        self.adapter_fingerprint = adapter.fingerprint()
        self.policy_version = version

    def sleep(self) -> None:
        """Nothing to give back."""

    def released_bytes(self) -> int:
        """None."""
        return 0

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to release."""

    def held_adapter(self) -> Adapter:
        """See `Engine.held_adapter`."""
        if self._adapter is None:
            return Adapter(lora_a={}, lora_b={}, scaling=1.0)
        lora_b = {name: tensor * self._adapter.scaling for name, tensor in self._adapter.lora_b.items()}
        return Adapter(lora_a=self._adapter.lora_a, lora_b=lora_b, scaling=1.0)

    def held_weights(self) -> dict[str, Tensor]:
        """A function has none."""
        return {}

    def base_tensors(self) -> dict[str, Tensor]:
        """A function has none."""
        return {}

    def _complete(self, prompt: tuple[int, ...], sampling: SamplingParams, seed: int) -> Completion:
        token_ids: list[int] = []
        logprobs: list[float] = []
        plain: list[float] = []
        finish_reason = FINISH_LENGTH
        stops = StopStrings(self._tokenizer, [prompt], sampling.stop) if sampling.stop else None
        with torch.inference_mode():
            while len(token_ids) < sampling.max_tokens:
                logits = self._logits([*prompt, *token_ids], self._adapter)[-1:]
                scores = logits
                if sampling.has_penalties:
                    penalties = Penalties([prompt], sampling, logits.shape[-1], logits.device)
                    for earlier in token_ids:
                        penalties.count(torch.tensor([earlier]))
                    scores = penalties.apply(logits)
                token, logprob = draw_tokens(scores, sampling, counter_uniforms([seed], len(token_ids)))
                token_ids.append(int(token))
                logprobs.append(float(logprob))
                plain.append(float(plain_logprobs(logits, token, sampling.temperature)))
                is_text_complete = stops is not None and stops.is_completed_by(0, token_ids[-1])
                if token_ids[-1] in sampling.stop_token_ids or is_text_complete:
                    finish_reason = FINISH_STOP
                    break
        return Completion(
            token_ids=tuple(token_ids),
            sampling_logprobs=tuple(logprobs),
            plain_logprobs=() if sampling.is_plain else tuple(plain),
            finish_reason=finish_reason,
            seed=seed,
            policy_version=self.policy_version,
            adapter_fingerprint=self.adapter_fingerprint,
        )
