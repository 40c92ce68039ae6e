"""The weights of an exported folder: written, read back and compared with the run's policy.

Shapes: N tokens of the probe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlbench.checks.limits import Gap
from rlbench.commands.export_proof import (
    Probe,
    check_equal,
    check_recorded,
    choose_probe,
    gap,
    plain_logprobs,
    policy_logprobs,
)
from rlbench.commands.export_run import ORIGINAL, STOCHASTIC, TRAINED, ExportOptions, TrainedWeights
from rlbench.config.schema import RunConfig
from rlbench.models.base import load_base, share_base
from rlbench.models.full_policy import MODEL_FOLDER, FullPolicy
from rlbench.models.merge import Rounding, Survival, merge_, round_
from rlbench.models.merge_base import dense_base
from rlbench.models.model_folder import share_mode
from rlbench.models.policy import Policy
from rlbench.models.quiet import no_progress_bars
from rlbench.models.source import ResolvedModel
from rlbench.models.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What is exported, before any weight is loaded."""

    options: ExportOptions
    config: RunConfig
    weights: TrainedWeights
    model: ResolvedModel  # the base
    tokenizer: Any
    note: Callable[[str], None]  # says what is being done

    @property
    def base_name(self) -> str:
        """For PEFT and transformers: a hub id, or where the base lies now."""
        is_place = Path(self.model.name).expanduser().exists()
        return str(self.model.folder.resolve()) if is_place else self.model.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """|difference| of logprobs over the probe's tokens, in nats; and what rounding kept."""

    fingerprint: str  # of what was trained
    probe: Probe
    policy: Gap  # the folder against the run's policy
    folder: Gap  # the folder against the same weights in memory
    moved: Gap  # the run's policy against the untrained model: what training did
    recorded: Gap | None  # the run's policy against what its sampler reported
    other_base: Gap | None = None  # the adapter on the original base against the run's policy
    survival: Survival | None = None


def write_weights(job: ExportJob, folder: Path) -> Proof:
    """Write the model or the adapter and the tokenizer into `folder`, read them back, prove that they are the policy.

    Raises:
        ValueError: the base cannot be loaded or another one was trained on, or the proof failed.
        OSError, SafetensorError: it cannot be written.
    """
    if job.config.training.parameters == "full":
        proof = _write_full(job, folder)
    elif job.options.format == "adapter":
        proof = _write_adapter(job, folder)
    else:
        proof = _write_merged(job, folder)
    _save_tokenizer(job.tokenizer, folder)
    again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if (again.get_vocab(), again.chat_template) != (job.tokenizer.get_vocab(), job.tokenizer.chat_template):
        raise ValueError("the proof failed: the tokenizer that was written reads back as another; nothing was exported")
    return proof


def _write_merged(job: ExportJob, folder: Path) -> Proof:
    options = job.options
    base, policy = _adapted(job, TRAINED)
    adapter = policy.adapter()
    fingerprint = _checked(job, adapter.fingerprint())
    probe, recorded = _probe(job, policy, fingerprint)
    trained = policy_logprobs(policy, probe)
    moved = gap(trained, policy_logprobs(policy, probe, use_adapter=False))
    intended, other_base = trained, None
    if options.base == ORIGINAL:
        del base, policy
        base, policy = _adapted(job, ORIGINAL)
        intended = policy_logprobs(policy, probe)
        other_base = gap(intended, trained)
    job.note(f"merging {len(adapter.lora_a)} matrices in float32, rounding to {options.dtype}")
    rounding = Rounding(
        dtype=getattr(torch, options.dtype), is_stochastic=options.rounding == STOCHASTIC, fingerprint=fingerprint
    )
    survival = merge_(base, adapter, rounding)
    merged = policy_logprobs(policy, probe, use_adapter=False)
    check_equal(merged, intended, "the merged weights do not compute what base and adapter do")
    round_(base, adapter, rounding)
    rounded = policy_logprobs(policy, probe, use_adapter=False)
    del policy
    _save_model(base, folder, rounding.dtype)
    del base
    found = _read_back(job, folder, probe, rounded)
    return Proof(
        fingerprint=fingerprint,
        probe=probe,
        policy=gap(found, trained),
        folder=gap(found, rounded),
        moved=moved,
        recorded=recorded,
        other_base=other_base,
        survival=survival,
    )


def _write_adapter(job: ExportJob, folder: Path) -> Proof:
    base, policy = _adapted(job, TRAINED)
    fingerprint = _checked(job, policy.adapter().fingerprint())
    probe, recorded = _probe(job, policy, fingerprint)
    trained = policy_logprobs(policy, probe)
    policy.save_adapter(folder, job.base_name)
    job.note("reading the adapter back with PEFT")
    found = plain_logprobs(PeftModel.from_pretrained(share_base(base), str(folder)), probe)
    check_equal(found, trained, "the adapter that was written does not compute what the run's policy does")
    return Proof(
        fingerprint=fingerprint,
        probe=probe,
        policy=gap(found, trained),
        folder=gap(found, trained),
        moved=gap(trained, policy_logprobs(policy, probe, use_adapter=False)),
        recorded=recorded,
    )


def _write_full(job: ExportJob, folder: Path) -> Proof:
    """Of all weights the policy is the masters rounded to the run's dtype."""
    own, written = (getattr(torch, dtype) for dtype in (job.config.model.dtype, job.options.dtype))
    base, policy = _all_weights(job)
    round_(base, None, Rounding(dtype=own))
    tensors = {name: tensor.to(own) for name, tensor in policy.weights().tensors.items()}
    fingerprint = _checked(job, Weights(tensors=tensors).fingerprint())
    probe, recorded = _probe(job, policy, fingerprint)
    trained = policy_logprobs(policy, probe)
    untrained = plain_logprobs(dense_base(str(job.model.folder), job.config.model, TRAINED), probe)
    if written != own:
        del base, policy
        base, policy = _all_weights(job)
        round_(base, None, Rounding(dtype=written))
    rounded = policy_logprobs(policy, probe)
    del policy
    _save_model(base, folder, written)
    del base
    found = _read_back(job, folder, probe, rounded)
    return Proof(
        fingerprint=fingerprint,
        probe=probe,
        policy=gap(found, trained),
        folder=gap(found, rounded),
        moved=gap(trained, untrained),
        recorded=recorded,
    )


def _adapted(job: ExportJob, which: str) -> tuple[PreTrainedModel, Policy]:
    """The base in float32, and the policy over its tensors."""
    job.note(f"loading {job.model.name}, the {which} weights")
    is_on_gpu = job.config.hardware.profile == "gpu" and torch.cuda.is_available()
    base = dense_base(str(job.model.folder), job.config.model, which, is_on_gpu=is_on_gpu)
    policy = Policy(base, replace(job.config.lora, init_from=None, dropout=0.0), seed=job.config.seed)
    policy.load(job.weights.folder)
    return base, policy


def _all_weights(job: ExportJob) -> tuple[PreTrainedModel, FullPolicy]:
    place = job.weights.folder / MODEL_FOLDER
    job.note(f"loading {place}")
    base = load_base(str(place), dtype=torch.float32, device="cpu")
    return base, FullPolicy(base)


def _probe(job: ExportJob, policy: Policy, fingerprint: str) -> tuple[Probe, Gap | None]:
    probe = choose_probe(job.options.run_folder, job.weights.step, fingerprint, job.config, job.tokenizer)
    job.note(f"logprobs of {len(probe.completions)} sequences, {probe.num_tokens} tokens: {probe.origin}")
    return probe, check_recorded(policy, probe, job.config)


def _checked(job: ExportJob, fingerprint: str) -> str:
    recorded = job.weights.fingerprint
    if recorded and fingerprint != recorded:
        raise ValueError(
            f"{job.weights.folder} holds weights with fingerprint {fingerprint}, but its state says {recorded}; "
            "expected the config.yaml that the run was made with"
        )
    return fingerprint


def _save_model(base: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    for parameter in base.parameters():  # a tied head is the embedding's own parameter
        parameter.data = parameter.data.to(dtype)
    with no_progress_bars():
        base.save_pretrained(str(folder))
    share_mode(folder, "config.json")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if "(os error" not in str(error):
            raise
        raise OSError(str(error)) from error  # tokenizers' writer has no class of its own for a full disk


def _read_back(job: ExportJob, folder: Path, probe: Probe, expected: Tensor) -> Tensor:
    job.note("reading the folder back with transformers")
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).eval()
    found = plain_logprobs(model, probe)
    check_equal(found, expected, "the folder that was written does not compute what its weights do in memory")
    return found
