"""The complete engine without vLLM: our own decoding loop over a transformers model.

Distinct prompts are prefilled once, in one packed forward; keys and values live in preallocated memory; finished rows
are moved out; every sample draws from its own counter-based stream of uniforms.

Shapes: B rows (samples) alive, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlbench import progress
from rlbench.engine.decoders import make_decoder
from rlbench.engine.interface import BASE_FINGERPRINT, Adapter, OnFinished
from rlbench.engine.kv_cache import CacheShape, DecodeCache, PromptCache
from rlbench.engine.penalties import Penalties
from rlbench.engine.sampling import counter_uniforms, draw_tokens, plain_logprobs
from rlbench.engine.stop_strings import StopStrings
from rlbench.models.base import output_softcap, output_weight
from rlbench.models.weights import Weights, check_weights, copy_weights
from rlbench.records import FINISH_LENGTH, FINISH_STOP, Completion, SamplingParams
from rlbench_kernels.masked_attention import cap_scores

_COMPACT_WHEN_FINISHED = 1 / 8  # of the rows; moving [60, 64, 3, 128, 64] bf16 together costs about 1/10 of a step
_SCORE_TOKENS = 4096  # packed tokens per scoring forward


class HfEngine:
    """Engine contract over a transformers model; see `rlbench.engine.interface.Engine`.

    The base weights are the very tensors of `base`: only the adapter is copied. `Weights` whose tensors are those of
    `base` are not copied either.
    """

    name = "hf"

    def __init__(self, base: PreTrainedModel, *, max_num_seqs: int = 64, tokenizer: Any = None) -> None:
        """
        Args:
            base: frozen model; its tensors are shared, its modules are not changed.
            max_num_seqs: most rows decoded together; more samples are run in waves.
            tokenizer: the model's fast tokenizer, for stop strings.
        """
        self._base = base
        self._tokenizer = tokenizer
        self._decoder = make_decoder(base)
        self._head = output_weight(base)
        self._softcap = output_softcap(base)
        self._max_num_seqs = max_num_seqs
        config = base.config.get_text_config()
        self._context = int(config.max_position_embeddings)
        self._cache_shape = CacheShape(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=self._head.dtype,
            device=self._head.device,
        )
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
        with torch.inference_mode():
            for start in range(0, len(prompts), self._max_num_seqs):
                wave = slice(start, start + self._max_num_seqs)
                report = _from(start, on_finished) if on_finished is not None else None
                completions += self._generate_wave(prompts[wave], sampling, seeds[wave], report)
        return completions

    def score(
        self, prompt_token_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], *, use_adapter: bool = True
    ) -> list[list[float]]:
        """See `Engine.score`."""
        prompts = check_sequences(prompt_token_ids, token_ids, self._context)
        self._decoder.slots.enable(use_adapter)
        try:
            with torch.inference_mode():
                return [x for part in _chunks(prompts, token_ids) for x in self._score_chunk(*part)]
        finally:
            self._decoder.slots.enable(True)

    def sync(self, weights: Adapter | Weights, version: int) -> None:
        """See `Engine.sync`."""
        if version < self.policy_version:
            raise ValueError(f"sync to policy_version {version}, but the engine already has {self.policy_version}")
        if isinstance(weights, Weights):
            own = self.held_weights()
            check_weights(weights, {name: tuple(tensor.shape) for name, tensor in own.items()})
            copy_weights(weights, own)
        else:
            self._decoder.slots.load(weights)
        self.adapter_fingerprint = weights.fingerprint()
        self.policy_version = version

    def held_adapter(self) -> Adapter:
        """See `Engine.held_adapter`."""
        return self._decoder.slots.held()

    def held_weights(self) -> dict[str, Tensor]:
        """See `Engine.held_weights`: the very tensors of the base."""
        return self.base_tensors()

    def base_tensors(self) -> dict[str, Tensor]:
        """See `Engine.base_tensors`: the very tensors of the base."""
        return {name: parameter.detach() for name, parameter in self._base.named_parameters()}

    def sleep(self) -> None:
        """Nothing to give back: key-value memory lives only while `generate` runs."""

    def released_bytes(self) -> int:
        """None."""
        return 0

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to release: the base belongs to the caller."""

    def _prefill(self, sequences: Sequence[Sequence[int]]) -> tuple[PromptCache, Tensor]:
        """Cache of the sequences and the hidden states [T, D] of all their tokens, one after the other."""
        device = self._head.device
        cache = PromptCache(self._cache_shape, [len(s) for s in sequences])
        token_ids = torch.tensor([t for s in sequences for t in s], device=device)
        position_ids = torch.cat([torch.arange(len(s), device=device) for s in sequences])
        hidden = self._decoder.hidden(token_ids[None], position_ids[None], cache)
        return cache, hidden[0]

    def _generate_wave(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams,
        seeds: Sequence[int],
        on_finished: OnFinished | None,
    ) -> list[Completion]:
        distinct = list(dict.fromkeys(prompts))
        group_index = {prompt: i for i, prompt in enumerate(distinct)}
        cache, hidden = self._prefill(distinct)
        last_rows = cache.lengths.cumsum(0) - 1  # [G]
        groups = torch.tensor([group_index[p] for p in prompts], device=self._head.device)
        logits = self._logits(hidden[last_rows])[groups]  # [B, V]
        own = DecodeCache(self._cache_shape, cache, groups, max(1, sampling.max_tokens - 1))
        rows = _Rows.start(prompts, seeds, sampling, self._tokenizer)
        positions = cache.lengths[groups]  # [B] position of the token drawn next
        completions: dict[int, Completion] = {}
        while True:
            tokens = rows.draw(logits)  # [B]
            progress.mark()
            for sample in rows.just_finished:
                completions[sample] = self._completion(rows, sample, seeds[sample])
                if on_finished is not None:
                    on_finished(sample, completions[sample])
            if not rows.alive:
                return [completions[sample] for sample in range(len(seeds))]
            kept = rows.compact()
            if kept is not None:
                kept = kept.to(tokens.device)
                own.keep_rows(kept)
                tokens, positions = tokens[kept], positions[kept]
            own.advance()
            hidden = self._decoder.hidden(tokens[:, None], positions[:, None], own)[:, 0]
            positions = positions + 1
            logits = self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], float32 where they are capped, else in the head's dtype."""
        logits = F.linear(hidden, self._head)
        return logits if self._softcap is None else cap_scores(logits.float(), self._softcap)

    def _completion(self, rows: _Rows, sample: int, seed: int) -> Completion:
        return Completion(
            token_ids=tuple(rows.token_ids[sample]),
            sampling_logprobs=tuple(rows.logprobs[sample]),
            plain_logprobs=tuple(rows.plain[sample]),
            finish_reason=rows.finish_reasons[sample],
            seed=seed,
            policy_version=self.policy_version,
            adapter_fingerprint=self.adapter_fingerprint,
        )

    def _score_chunk(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        # The last token predicts nothing that is asked for.
        sequences = [(*p, *c)[:-1] for p, c in zip(prompts, completions, strict=True)]
        _, hidden = self._prefill(sequences)
        scores: list[list[float]] = []
        end = 0
        for prompt, completion, sequence in zip(prompts, completions, sequences, strict=True):
            rows = hidden[end + len(prompt) - 1 : end + len(sequence)]  # [N, D]
            logits = self._logits(rows).float()
            targets = torch.tensor(list(completion), device=logits.device)
            scores.append((logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)).tolist())
            end += len(sequence)
        progress.mark()
        return scores


@dataclass(slots=True)
class _Rows:
    """What the rows of one wave have drawn. `samples[r]` is the sample that row r belongs to."""

    sampling: SamplingParams
    seeds: Sequence[int]
    prompts: Sequence[tuple[int, ...]]
    stops: StopStrings | None
    samples: list[int]
    token_ids: list[list[int]]
    logprobs: list[list[float]]
    plain: list[list[float]]  # stay empty where they equal logprobs
    finish_reasons: list[str]
    position: int = 0
    alive: set[int] = field(default_factory=set)
    just_finished: list[int] = field(default_factory=list)  # in the last draw
    penalties: Penalties | None = None  # made at the first draw

    @classmethod
    def start(
        cls, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampling: SamplingParams, tokenizer: Any
    ) -> _Rows:
        n = len(seeds)
        return cls(
            sampling=sampling,
            seeds=seeds,
            prompts=prompts,
            stops=StopStrings(tokenizer, prompts, sampling.stop) if sampling.stop else None,
            samples=list(range(n)),
            token_ids=[[] for _ in seeds],
            logprobs=[[] for _ in seeds],
            plain=[[] for _ in seeds],
            finish_reasons=[""] * n,
            alive=set(range(n)),
        )

    def draw(self, logits: Tensor) -> Tensor:
        """Draw a token for every row; rows that had finished before draw too but nothing is recorded. -> [B]."""
        uniforms = counter_uniforms([self.seeds[s] for s in self.samples], self.position).to(logits.device)
        tokens, logprobs = draw_tokens(self._penalised(logits), self.sampling, uniforms)
        if self.penalties is not None:
            self.penalties.count(tokens)
        self.position += 1
        for sample, token, logprob in zip(self.samples, tokens.tolist(), logprobs.tolist(), strict=True):
            if sample in self.alive:
                self.token_ids[sample].append(token)
                self.logprobs[sample].append(logprob)
        if not self.sampling.is_plain:
            plain = plain_logprobs(logits, tokens, self.sampling.temperature)
            for sample, logprob in zip(self.samples, plain.tolist(), strict=True):
                if sample in self.alive:
                    self.plain[sample].append(logprob)
        self.just_finished = [sample for sample in sorted(self.alive) if self._is_finished(sample)]
        self.alive.difference_update(self.just_finished)
        return tokens

    def _penalised(self, logits: Tensor) -> Tensor:
        if not self.sampling.has_penalties:
            return logits
        if self.penalties is None:
            self.penalties = Penalties(self.prompts, self.sampling, logits.shape[-1], logits.device)
        return self.penalties.apply(logits)

    def _is_finished(self, sample: int) -> bool:
        """Whether the sample's last token ends it; if so, notes why."""
        token = self.token_ids[sample][-1]
        if token in self.sampling.stop_token_ids or (self.stops and self.stops.is_completed_by(sample, token)):
            self.finish_reasons[sample] = FINISH_STOP
        elif self.position == self.sampling.max_tokens:
            self.finish_reasons[sample] = FINISH_LENGTH
        else:
            return False
        return True

    def compact(self) -> Tensor | None:
        """Row indices to keep, once enough rows have finished to pay for moving the others; else None."""
        num_finished = len(self.samples) - len(self.alive)
        if num_finished < max(1, _COMPACT_WHEN_FINISHED * len(self.samples)):
            return None
        kept = [row for row, sample in enumerate(self.samples) if sample in self.alive]
        self.samples = [self.samples[row] for row in kept]
        rows = torch.tensor(kept)
        if self.penalties is not None:
            self.penalties.keep_rows(rows)
        return rows


def _from(start: int, on_finished: OnFinished) -> OnFinished:
    """`on_finished` for the samples of a wave that begins at sample `start`."""
    return lambda index, completion: on_finished(start + index, completion)


def check_unguided(sampling: SamplingParams, engine_name: str) -> None:
    """Raises ValueError if the completion should follow a guide: only vLLM has one."""
    if sampling.is_guided:
        key = "guided_choice" if sampling.guided_choice else "guided_regex"
        raise ValueError(f"sampling.{key} is set, which engine={engine_name} cannot follow; expected engine=vllm")


def check_prompts(
    prompts: Sequence[Sequence[int]], others: Sequence[object], max_tokens: int, context: int
) -> list[tuple[int, ...]]:
    """The prompts as tuples.

    Raises:
        ValueError: if the numbers differ, a prompt is empty, or a prompt plus `max_tokens` exceeds the context.
    """
    if len(prompts) != len(others):
        raise ValueError(
            f"{len(prompts)} prompts, but {len(others)} seeds or completions: expected one for each prompt"
        )
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty, expected at least one token")
        if len(prompt) + max_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, with sampling.max_tokens {max_tokens} more than the "
                f"model's context of {context}"
            )
    return [tuple(p) for p in prompts]


def check_sequences(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], context: int
) -> list[tuple[int, ...]]:
    """The prompts as tuples, for scoring.

    Raises:
        ValueError: as `check_prompts`, or if a prompt and its completion exceed the context together.
    """
    checked = check_prompts(prompts, completions, 0, context)
    for index, (prompt, completion) in enumerate(zip(checked, completions, strict=True)):
        if len(prompt) + len(completion) > context:
            raise ValueError(
                f"prompt {index} and its completion have {len(prompt) + len(completion)} tokens, more than the model's "
                f"context of {context}"
            )
    return checked


def _chunks(
    prompts: list[tuple[int, ...]], completions: Sequence[Sequence[int]]
) -> list[tuple[list[tuple[int, ...]], list[Sequence[int]]]]:
    """Neighbouring sequences of together at most `_SCORE_TOKENS` tokens (or one longer sequence)."""
    chunks: list[tuple[list[tuple[int, ...]], list[Sequence[int]]]] = []
    room = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        size = len(prompt) + len(completion)
        if not chunks or size > room:
            chunks.append(([], []))
            room = _SCORE_TOKENS
        chunks[-1][0].append(prompt)
        chunks[-1][1].append(completion)
        room -= size
    return chunks
