"""What vLLM's sampler learns from us: the plain logprob of each drawn token, beside the one that it was drawn with.

vLLM reports logprobs either before or after temperature, penalties and truncation, for the whole engine. We need
both: the second is what a token was drawn with, the first is what the trainer's logprobs compare with. Nothing here
imports vllm.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_GREEDY = 1e-5  # vLLM takes lower temperatures for greedy


class PlainLogprobs:
    """Mixed into the `Sampler` of vLLM's first model runner (CPU).

    Asked for one logprob besides the sampled token's, it reports the plain one there. vLLM would put the most likely
    token into that column. Instead it gets `log_softmax(logits / temperature)` of the sampled token; the column's token
    id stays and means nothing.
    """

    _rlbench_plain: Tensor | None = None  # [B, V], while a batch is sampled

    def forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        if sampling_metadata.max_num_logprobs == 1:
            self._rlbench_plain = _plain(logits, sampling_metadata.temperature)  # before vLLM writes into the logits
        try:
            return super().forward(logits, sampling_metadata, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._rlbench_plain = None

    def gather_logprobs(self, logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
        gathered = super().gather_logprobs(logprobs, num_logprobs, token_ids)  # type: ignore[misc]
        if self._rlbench_plain is not None:
            _write_plain(gathered, self._rlbench_plain, token_ids)
        return gathered


class PlainLogprobsV2:
    """`PlainLogprobs` for the `Sampler` of vLLM's second model runner (GPU)."""

    sampling_states: Any

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        if self.sampling_states.max_num_logprobs(input_batch.idx_mapping_np) != 1:
            return super().__call__(logits, input_batch)  # type: ignore[misc]
        temperature = self.sampling_states.temperature.gpu[input_batch.expanded_idx_mapping]
        plain = _plain(logits, temperature)  # before vLLM writes into the logits
        output = super().__call__(logits, input_batch)  # type: ignore[misc]
        _write_plain(output.logprobs_tensors, plain, output.sampled_token_ids[:, 0])
        return output


def report_plain_logprobs(sampler: Any) -> None:
    """Make a live vLLM sampler one that reports plain logprobs too; again changes nothing.

    Raises:
        ValueError: this vLLM's sampler is neither of the two that are extended.
    """
    kind = type(sampler)
    if issubclass(kind, (PlainLogprobs, PlainLogprobsV2)):
        return
    is_sampler = kind.__name__ == "Sampler"
    if is_sampler and all(hasattr(kind, name) for name in ("forward", "gather_logprobs")):
        extension: type = PlainLogprobs
    elif is_sampler and hasattr(sampler, "sampling_states"):
        extension = PlainLogprobsV2
    else:
        raise ValueError(
            f"sampling: this vLLM samples with {kind.__module__}.{kind.__name__}, whose plain logprobs cannot be "
            "read; expected top_p=1, top_k=0, min_p=0 and no penalties, or engine.kind=hf"
        )
    sampler.__class__ = type("RlbenchSampler", (extension, kind), {})


def _plain(logits: Tensor, temperature: Tensor | None) -> Tensor:
    """float32 [B, V]; rows without a temperature, or with a greedy one, count as 1."""
    scores = logits.float()
    if temperature is not None:
        scores = scores / torch.where(temperature < _GREEDY, 1.0, temperature)[:, None]
    return scores.log_softmax(dim=-1)


def _write_plain(reported: Any, plain: Tensor, token_ids: Tensor) -> None:
    """Into column 1 of vLLM's `LogprobsTensors`; plain [B, V], token_ids int64 [B]."""
    reported.logprobs[:, 1] = plain.gather(1, token_ids[:, None].long())[:, 0]
