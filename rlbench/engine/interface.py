"""The contract of every engine: token in, token out, weights named by version and fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rlbench.config.own_errors import is_raised_by_us
from rlbench.models.adapter import Adapter
from rlbench.models.weights import Weights
from rlbench.records import Completion, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BASE_FINGERPRINT", "Adapter", "Engine", "EngineCorruptedError", "EngineDeadError", "OnFinished", "Weights",
    "engine_call",
]  # fmt: skip

BASE_FINGERPRINT = "base"
OnFinished = Callable[[int, Completion], None]


class EngineCorruptedError(Exception):
    """The engine no longer computes what it computed when it started."""


class EngineDeadError(Exception):
    """A call of the engine ended in an error of its own; what it would do next is not known."""


@runtime_checkable
class Engine(Protocol):
    """Samples completions and scores token sequences with the base model plus the adapter last synced.

    An engine starts with the base alone: `policy_version` 0 and `adapter_fingerprint` "base". One that is synced with
    `Weights` computes with them in place of base and adapter, and `adapter_fingerprint` is theirs.
    """

    name: str
    policy_version: int
    adapter_fingerprint: str

    def generate(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """Sample one completion for each prompt.

        Args:
            prompt_token_ids: one non-empty token sequence a sample. Equal prompts are prefilled once.
            sampling: shared by all samples.
            seeds: one unsigned 63-bit integer a sample. A sample's tokens depend on its prompt, its seed, `sampling`
                and the weights, not on its place in the batch nor on the other samples.
            on_finished: called once a sample, in this thread, with its index and its completion, as soon as the
                completion is known: others are still being generated, so it must be quick. What it raises ends the
                call.

        Returns:
            Completions in the order of the prompts.

        Raises:
            ValueError: if the lengths differ, a prompt is empty, a prompt plus `max_tokens` exceeds the context, or the
                engine cannot draw in this way.
        """
        ...

    def score(
        self, prompt_token_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], *, use_adapter: bool = True
    ) -> list[list[float]]:
        """Log-softmax of the plain logits (temperature 1) at each completion token, given prompt and prefix.

        Args:
            prompt_token_ids: one non-empty prompt a sequence.
            token_ids: one completion a sequence, not empty.
            use_adapter: False scores with the base alone.

        Returns:
            For each sequence one float per completion token.
        """
        ...

    def sync(self, weights: Adapter | Weights, version: int) -> None:
        """Take over a copy of the weights; later changes of the caller's tensors do not reach the engine.

        Of `Weights`, tensors that are the engine's own memory are not copied, and their changes reach it at once.

        Args:
            weights: LoRA weights for every adapted linear layer, or all weights of the model.
            version: number of optimizer steps applied; must not fall.

        Raises:
            ValueError: if `version` is lower than the current one, or a name or shape does not fit; nothing is changed
                then.
        """
        ...

    def held_adapter(self) -> Adapter:
        """The LoRA weights that it computes with: live tensors in its own dtype, scaling folded into B (scaling 1).

        Layers without an adapter are absent or hold zeros; ranks may be padded with zeros.
        """
        ...

    def held_weights(self) -> Mapping[str, Tensor]:
        """Live tensors that `sync` fills from `Weights`, by the same names, as far as it keeps them as tensors."""
        ...

    def base_tensors(self) -> Mapping[str, Tensor]:
        """Live weights of the base that it computes with, as far as it keeps them as tensors, by name."""
        ...

    def sleep(self) -> None:
        """Give back memory that only generation needs (KV cache). Weights stay."""
        ...

    def released_bytes(self) -> int:
        """Bytes that `sleep` has given back, though torch's allocator goes on counting them as in use."""
        ...

    def wake(self) -> None:
        """Undo `sleep`. `generate` and `score` wake the engine themselves."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


@contextmanager
def engine_call(engine: Engine, what: str) -> Iterator[None]:
    """Around a call of the engine: its errors become `EngineDeadError`.

    What our own code says about a setting stays a ValueError; memory is judged by the phase, see
    `rlbench.training.microbatch_budget.phase_memory`.

    Args:
        engine: that is called.
        what: in words, e.g. "generation".
    """
    import torch

    try:
        yield
    except (EngineCorruptedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and is_raised_by_us(error):
            raise
        reason = str(error).strip().split("\n")[0][:300]
        raise EngineDeadError(f"engine={engine.name} failed in {what}: {type(error).__name__}: {reason}") from error
