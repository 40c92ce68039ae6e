"""Rollouts of an earlier run in place of an engine and of rewards: updates without generation, to debug a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rlbench.engine.interface import BASE_FINGERPRINT, Adapter, OnFinished, Weights
from rlbench.records import Completion, Rollout, SamplingParams
from rlbench.tracking.rollout_store import read_groups, read_rollout_table


class RecordedEngine:
    """Engine contract over `rollouts/step-*.parquet` of a run; completions are found by their seed.

    A completion keeps its tokens and sampling logprobs, and names the adapter that is trained now: where the trainer
    changed, rollouts are off-policy, and the drift metrics show it.

    Raises:
        ValueError: the run holds no rollouts.
    """

    name = "recorded"

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        files = sorted((run_folder / "rollouts").glob("step-*.parquet"))
        if not files:
            raise ValueError(
                f"engine.recorded_from is {run_folder}, which holds no rollouts; expected the folder of a run with "
                "tracking.save_rollouts=true"
            )
        self.num_steps = len(files)
        self._file_of = {
            seed: file for file in files for seed in read_rollout_table(file, ["seed"])["seed"].to_pylist()
        }
        self._open: tuple[Path | None, dict[int, Rollout]] = (None, {})  # the file read last
        self._adapter = Adapter(lora_a={}, lora_b={}, scaling=1.0)
        self.policy_version = 0
        self.adapter_fingerprint = BASE_FINGERPRINT

    def rollout(self, seed: int) -> Rollout:
        """
        Raises:
            ValueError: none was recorded.
        """
        file = self._file_of.get(seed)
        if file is None:
            raise ValueError(
                f"engine.recorded_from is {self._run_folder}, which holds no rollout for a prompt of this run; "
                "expected a run with equal seed, data.*, algorithm.prompts_per_step and algorithm.group_size"
            )
        if file != self._open[0]:
            rollouts = [rollout for group in read_groups(file) for rollout in group.rollouts]
            self._open = (file, {rollout.completion.seed: rollout for rollout in rollouts})
        return self._open[1][seed]

    def generate(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """What was sampled for these prompts and seeds.

        Raises:
            ValueError: nothing was, or it was for other prompts or under other sampling settings.
        """
        if not sampling.is_plain:
            raise ValueError(
                "engine=recorded needs plain sampling: of top_p, top_k, min_p, penalties and guides only the truncated "
                "logprobs are on record"
            )
        completions = []
        for prompt, seed in zip(prompt_token_ids, seeds, strict=True):
            rollout = self.rollout(seed)
            if tuple(prompt) != rollout.prompt.token_ids or len(rollout.completion.token_ids) > sampling.max_tokens:
                raise ValueError(
                    f"rollout {rollout.rollout_id} of {self._run_folder} has another prompt than this run, or more "
                    f"tokens than sampling.max_tokens ({sampling.max_tokens}); expected equal model.path, data.* and "
                    "sampling.*"
                )
            completions.append(self._relabelled(rollout.completion))
            if on_finished is not None:
                on_finished(len(completions) - 1, completions[-1])
        return completions

    def _relabelled(self, completion: Completion) -> Completion:
        return Completion(
            token_ids=completion.token_ids,
            sampling_logprobs=completion.sampling_logprobs,
            finish_reason=completion.finish_reason,
            seed=completion.seed,
            policy_version=self.policy_version,
            adapter_fingerprint=self.adapter_fingerprint,
        )

    def score(
        self, prompt_token_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], *, use_adapter: bool = True
    ) -> list[list[float]]:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError("engine=recorded has no model and cannot score; expected engine=hf or engine=vllm")

    def sync(self, weights: Adapter | Weights, version: int) -> None:
        """See `Engine.sync`; only their name is taken over."""
        if version < self.policy_version:
            raise ValueError(f"sync to policy_version {version}, but the engine already has {self.policy_version}")
        self.policy_version, self.adapter_fingerprint = version, weights.fingerprint()

    def held_adapter(self) -> Adapter:
        """None: nothing is computed here."""
        return self._adapter

    def held_weights(self) -> Mapping[str, Tensor]:
        """None: nothing is computed here."""
        return {}

    def base_tensors(self) -> Mapping[str, Tensor]:
        """None: nothing is computed here."""
        return {}

    def sleep(self) -> None:
        """Nothing to give back."""

    def released_bytes(self) -> int:
        """None."""
        return 0

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to release."""
