"""Whether an exported folder computes what the run's policy does: logprobs of the same tokens, all in float32.

With float32 on both sides, the weights are the only thing that a written dtype rounds, and what that does is measured:
the run's own policy with the weights rounded in memory. What the folder adds to it is a mistake, whatever the dtype.

Shapes: N completion tokens, one sequence after the other; L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlbench.checks.limits import Gap, identity_limit
from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs
from rlbench.config.schema import RunConfig, SamplingConfig
from rlbench.models.policy import Policy
from rlbench.records import Rollout, SamplingParams
from rlbench.tracking.rollout_store import read_groups, rollouts_path

# Nats, of one token. Packed and plain attention in float32 differ by 3e-5 at most on SmolLM2-135M
# (rlbench/checks/limits.py); larger models add longer sums, hence 30 times that.
LIMIT = 1e-3
_NUM_SEQUENCES = 8
_MAX_TOKENS = 128  # of a completion
_TEXTS = (
    "Question: A farmer has 12 sheep and buys 7 more. How many sheep are there now?\nAnswer: 12 + 7 = 19 sheep.",
    "The sum of the first ten numbers is 55, because they are five pairs of 11 each.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Tokens whose logprobs are compared.

    Example:
        Probe(prompts=((5, 6),), completions=((7, 8),), origin="a fixed text")
    """

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    origin: str
    recorded: tuple[float, ...] = ()  # logprobs of the run's sampler, which had these very weights; empty: not known
    temperature: float = 1.0  # of `recorded`

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.completions))


def choose_probe(run_folder: Path, step: int, fingerprint: str, config: RunConfig, tokenizer: Any) -> Probe:
    """Rollouts that were sampled from these weights where there are some, else of the nearest step, else fixed texts.

    Args:
        run_folder: of the run.
        step: after which the weights were those.
        fingerprint: of the weights.
        config: of the run.
        tokenizer: for the fixed texts.

    Raises:
        TrackingError: a rollout file cannot be read.
    """
    sampled_at = {} if config.sampling.is_guided else {rollouts_path(run_folder, step, "eval"): 1.0}  # greedy: as at 1
    if _is_plain(config.sampling):
        sampled_at[rollouts_path(run_folder, step + 1)] = config.sampling.temperature
    for file, temperature in sampled_at.items():
        rollouts = _first_rollouts(file) if file.is_file() else []
        if rollouts and {rollout.completion.adapter_fingerprint for rollout in rollouts} == {fingerprint}:
            kind = "answers of the evaluation after" if file.name.startswith("eval") else "rollouts sampled after"
            return _of_rollouts(rollouts, f"{kind} step {step}", temperature)
    found = {f.stem.removeprefix("step-"): f for f in (run_folder / "rollouts").glob("step-*.parquet")}
    files = {int(number): file for number, file in found.items() if number.isdigit()}
    nearest = min(files, key=lambda number: abs(number - step), default=0)
    rollouts = _first_rollouts(files[nearest]) if files else []
    if rollouts:
        return _of_rollouts(rollouts, f"rollouts of step {nearest}", None)
    tokens = [tuple(tokenizer(text)["input_ids"]) for text in _TEXTS]
    return Probe(
        prompts=tuple(ids[:1] for ids in tokens), completions=tuple(ids[1:] for ids in tokens), origin="fixed texts"
    )


def policy_logprobs(policy: Policy, probe: Probe, *, use_adapter: bool = True, temperature: float = 1.0) -> Tensor:
    """float32 [N], by the trainer's forward pass."""
    batch = pack_sequences(probe.prompts, probe.completions, policy.device)
    return trainer_logprobs(policy, batch, use_adapter=use_adapter, temperatures=(temperature,))[0]


@torch.no_grad()
def plain_logprobs(model: Any, probe: Probe) -> Tensor:
    """float32 [N], by transformers' own forward pass, one sequence at a time."""
    found = []
    for prompt, completion in zip(probe.prompts, probe.completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]  # [L, V]
        targets = torch.tensor(completion)[:, None]
        found.append(logits.float().log_softmax(-1).gather(-1, targets)[:, 0])
    return torch.cat(found)


def gap(a: Tensor, b: Tensor) -> Gap:
    """|a - b| of two [N]."""
    differences = (a - b).abs()
    return Gap(float(differences.mean()), float(differences.quantile(0.99)), float(differences.max()))


def check_equal(a: Tensor, b: Tensor, what: str) -> None:
    """
    Args:
        a: [N], float32 computations of what should be the same weights.
        b: [N].
        what: is wrong if they differ, in words.

    Raises:
        ValueError: by more than `LIMIT`.
    """
    found = gap(a, b)
    if not found.max <= LIMIT:  # nan too
        raise ValueError(
            f"the proof failed: {what}: logprobs differ by {found.mean:.2g} nats in the mean and {found.max:.2g} at "
            f"most, expected {LIMIT:g} at most; nothing was exported"
        )


def check_recorded(policy: Policy, probe: Probe, config: RunConfig) -> Gap | None:
    """|policy - what the run's sampler reported| of the same tokens; None: nothing was recorded of these weights.

    Raises:
        ValueError: by more than engine and trainer of that run may differ.
    """
    if not probe.recorded:
        return None
    own = policy_logprobs(policy, probe, temperature=probe.temperature)
    found, limit = gap(own, torch.tensor(probe.recorded)), identity_limit(config)
    if found.exceeds(limit):
        raise ValueError(
            f"the proof failed: base and adapter that were read give the {probe.origin} other logprobs than the run "
            f"recorded, |gap| mean / p99 / max {found} nats, expected at most {limit}; the base that model.path names "
            f"({config.model.path}) is not the one that was trained on"
        )
    return found


def _is_plain(sampling: SamplingConfig) -> bool:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    options = {name: getattr(sampling, name) for name in names}
    return not sampling.is_guided and SamplingParams(max_tokens=sampling.max_tokens, **options).is_plain


def _first_rollouts(file: Path) -> list[Rollout]:
    """Of the groups with the shortest prompts, one each, then the next ones of the same groups."""
    groups = sorted(read_groups(file), key=lambda group: len(group.prompt.token_ids))[:_NUM_SEQUENCES]
    longest = max((len(group.rollouts) for group in groups), default=0)
    found = [g.rollouts[i] for i in range(longest) for g in groups if i < len(g.rollouts)]
    return [rollout for rollout in found if rollout.completion.token_ids][:_NUM_SEQUENCES]


def _of_rollouts(rollouts: Sequence[Rollout], origin: str, temperature: float | None) -> Probe:
    """
    Args:
        temperature: of the recorded logprobs; None: these weights did not sample them.
    """
    recorded = [p for r in rollouts for p in r.completion.sampling_logprobs[:_MAX_TOKENS]]
    return Probe(
        prompts=tuple(r.prompt.token_ids for r in rollouts),
        completions=tuple(r.completion.token_ids[:_MAX_TOKENS] for r in rollouts),
        origin=origin,
        recorded=() if temperature is None else tuple(recorded),
        temperature=temperature or 1.0,
    )
