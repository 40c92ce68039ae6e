"""Our sampling parameters and sequences as vLLM's requests, and what its outputs say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from rlbench import progress
from rlbench.engine.interface import EngineCorruptedError
from rlbench.records import SamplingParams

_LOWEST_TEMPERATURE = 0.01  # vLLM raises anything lower but 0 to this


def check_requests(
    prompts: Sequence[Sequence[int]], others: Sequence[object], what: str, num_new: Sequence[int], context: int
) -> None:
    """Raises ValueError if the numbers differ, a prompt is empty, or it exceeds the context with its new tokens."""
    if len(prompts) != len(others):
        raise ValueError(f"{len(prompts)} prompts, but {len(others)} {what}: expected one for each prompt")
    for index, (prompt, new) in enumerate(zip(prompts, num_new, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty, expected at least one token")
        if len(prompt) + new > context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, with {new} new ones more than the engine's context of "
                f"{context} (sampling.max_tokens)"
            )


def check_sampling(sampling: SamplingParams, *, has_tokenizer: bool) -> None:
    """Raises ValueError for what vLLM would silently change, or cannot do in this engine."""
    if 0 < sampling.temperature < _LOWEST_TEMPERATURE:
        raise ValueError(
            f"sampling.temperature {sampling.temperature}: vLLM samples at {_LOWEST_TEMPERATURE} or more, expected "
            f"that, 0 (greedy) or engine.kind=hf"
        )
    if (sampling.stop or sampling.is_guided) and not has_tokenizer:
        raise ValueError("sampling.stop or a guide is set, but this engine was started without the model's tokenizer")
    if sampling.is_guided and sampling.temperature not in (0, 1):
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}, but guided decoding needs 1: the logprobs without the "
            "guide are scored afterwards, which vLLM does at temperature 1 only"
        )


def sampling_request(sampling: SamplingParams, seed: int) -> Any:
    """vLLM's parameters of one sample. Where the drawing is not plain, column 1 is the plain one (`PlainLogprobs`)."""
    guide = {"structured_outputs": _guide(sampling)} if sampling.is_guided else {}
    return params(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        stop_token_ids=list(sampling.stop_token_ids),
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
        seed=_vllm_seed(seed),
        logprobs=0 if sampling.is_plain or sampling.is_guided else 1,  # besides the sampled token's
        **guide,
    )


def _guide(sampling: SamplingParams) -> Any:
    from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

    if sampling.guided_choice:
        return StructuredOutputsParams(choice=list(sampling.guided_choice))
    return StructuredOutputsParams(regex=sampling.guided_regex)


def params(*, detokenize: bool = False, **options: Any) -> Any:
    """vLLM's sampling parameters: ends only at our stop tokens, makes no text unless asked."""
    from vllm import SamplingParams as VllmSamplingParams  # pyright: ignore[reportMissingImports]

    return VllmSamplingParams(ignore_eos=True, detokenize=detokenize, **options)


def finished_outputs(engine: Any, request_ids: Sequence[str], take: Callable[[int, Any], None]) -> list[Any]:
    """Step vLLM's engine until all requests are finished. Outputs in their order; `take` gets each at once.

    Args:
        engine: vLLM's `LLMEngine`, with these requests alone.
        request_ids: as `LLM.enqueue` gives them: the number that outputs carry, and sometimes a suffix.
        take: what it raises ends the call; then the requests that are left are aborted.
    """
    for request_id in request_ids:
        _keep_numbers_only(engine.output_processor.request_states[request_id].logprobs_processor)
    numbers = [request_id.partition("-")[0] for request_id in request_ids]
    index_of = {number: index for index, number in enumerate(numbers)}
    outputs: dict[int, Any] = {}
    try:
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = index_of[output.request_id]
                outputs[index] = output
                take(index, output)
            progress.mark()
    except BaseException:
        engine.abort_request([number for number in numbers if index_of[number] not in outputs])
        raise
    return [outputs[index] for index in range(len(numbers))]


@dataclass(slots=True)
class DrawnLogprobs:
    """Of one request's tokens, one after the other."""

    num_columns: int  # of each token: its own logprob, and the plain one if it was asked for
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class NumbersOnly:
    """Mixed into the `LogprobsProcessor` of a request: keeps the numbers that vLLM would make dicts and objects of.

    Of what the host does for 256 sequences a step, vLLM's own takes more than the rest of its output processor.
    """

    logprobs: DrawnLogprobs

    def update_from_output(self, output: Any) -> None:
        new = output.new_logprobs  # arrays [tokens of this step, columns]
        if new is not None:
            self.logprobs.token_ids.extend(new.logprob_token_ids.ravel().tolist())
            self.logprobs.logprobs.extend(new.logprobs.ravel().tolist())


def _keep_numbers_only(processor: Any) -> None:
    """For a request that asks for logprobs of its new tokens alone; others stay as they are."""
    if processor.logprobs is None or processor.prompt_logprobs is not None:
        return
    processor.__class__ = _numbers_only(type(processor))
    processor.logprobs = DrawnLogprobs(num_columns=1 + processor.num_logprobs)


@cache
def _numbers_only(kind: type) -> type:
    """vLLM's class with `NumbersOnly`; made once, not once a request."""
    return type("RlbenchLogprobsProcessor", (NumbersOnly, kind), {})


def sampled_logprobs(output: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sampling logprobs of the completion's tokens, and the plain ones (empty if they were not asked for).

    Raises:
        EngineCorruptedError: they are those of other tokens.
    """
    drawn: DrawnLogprobs = output.logprobs
    step = drawn.num_columns
    if drawn.token_ids[::step] != list(output.token_ids) or len(drawn.logprobs) != step * len(output.token_ids):
        raise EngineCorruptedError(
            f"vLLM returned {len(output.token_ids)} tokens, but {len(drawn.logprobs)} logprobs of other ones; expected "
            f"{step} of each token"
        )
    return tuple(drawn.logprobs[::step]), tuple(drawn.logprobs[1::step]) if step > 1 else ()


def scores(output: Any, sequence: Sequence[int], prompt_length: int) -> list[float]:
    """Logprobs of sequence[prompt_length:]: the last from the sampled position, the others from prompt logprobs."""
    inner = [output.prompt_logprobs[i][sequence[i]].logprob for i in range(prompt_length, len(sequence) - 1)]
    return [*inner, output.outputs[0].logprobs[0][sequence[-1]].logprob]


def _vllm_seed(seed: int) -> int:
    """Hash to 63 bits: torch's CPU generator looks at the low 32 bits only, counters may differ in the high ones."""
    return int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest(), "little") >> 1
