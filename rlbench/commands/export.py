"""`python -m rlbench export RUN DEST`: what a run trained as one folder that transformers and vLLM load, proved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from rlbench.commands.export_folder import whole_folder
from rlbench.commands.export_run import MERGED, ORIGINAL, STOCHASTIC, ExportOptions, find_weights, read_call
from rlbench.config.full_training import FULL
from rlbench.config.schema import RunConfig

if TYPE_CHECKING:
    from rlbench.commands.export_weights import ExportJob, Proof
    from rlbench.models.merge import Survival

_MOST_LOST = 0.1  # of the change, above which rounding is warned of


def export(arguments: Sequence[str]) -> int:
    """Exit status: 0.

    Raises:
        ValueError: anything a user can get wrong, or what was written is not what was trained; nothing is left.
        TrackingError: a file cannot be read or written; nothing is left.
    """
    options, config = read_call(arguments)
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    weights = find_weights(options, config)
    for warning in weights.warnings:
        say(f"warning: {warning}")
    say(f"step {weights.step}: {weights.origin}")

    from transformers import AutoTokenizer

    from rlbench.commands.export_card import write_card, write_record
    from rlbench.commands.export_weights import ExportJob, write_weights
    from rlbench.models.source import resolve_model

    model = resolve_model(config.model)
    tokenizer = AutoTokenizer.from_pretrained(str(model.folder), local_files_only=True)
    reason = _base_reason(options, config)
    if reason:
        say(reason)
    job = ExportJob(options=options, config=config, weights=weights, model=model, tokenizer=tokenizer, note=say)
    with whole_folder(options.destination) as folder:
        proof = write_weights(job, folder)
        write_record(job, proof, folder)
        write_card(job, proof, folder)
    say(_fingerprint_line(job, proof))
    for line in [*_proof_lines(options, proof), *_rounding_lines(options, proof.survival)]:
        say(line)
    say(f"written: {options.destination}, with rlbench_export.json and a model card")
    return 0


def _base_reason(options: ExportOptions, config: RunConfig) -> str:
    """Which weights the adapter is added to, where there is a choice, and why."""
    quantization = config.model.quantization
    if options.format != MERGED or config.training.parameters == FULL:
        return ""
    if options.base == ORIGINAL:
        made = f"quantised to {quantization}" if quantization != "none" else f"rounded to {config.model.dtype}"
        return (
            f"base: the checkpoint's own weights. The adapter was trained on them {made}, so the result is no policy "
            "that was ever sampled or evaluated"
        )
    if quantization == "none":
        return ""
    return (
        f"base: the {quantization} weights that were trained on, made dense: the adapter also corrects their "
        "quantisation, and rewards and evaluations of the run are theirs; --base original takes the checkpoint's own"
    )


def _fingerprint_line(job: ExportJob, proof: Proof) -> str:
    compared = "as the run recorded it" if job.weights.fingerprint else "not compared: the run left none that can be"
    return f"fingerprint: {proof.fingerprint}, {compared}"


def _proof_lines(options: ExportOptions, proof: Proof) -> list[str]:
    from rlbench.commands.export_proof import LIMIT

    lines = [
        f"proof: {proof.probe.num_tokens} tokens, |gap| in nats, all in float32",
        f"  training moved them by               mean {proof.moved.mean:.2g}, max {proof.moved.max:.2g}",
        f"  this folder against the run's policy mean {proof.policy.mean:.2g}, max {proof.policy.max:.2g}",
        f"  against the same weights in memory   mean {proof.folder.mean:.2g}, max {proof.folder.max:.2g} (limit "
        f"{LIMIT:g}, in any dtype; all beyond it is the rounding to {options.dtype})",
    ]
    if proof.other_base is not None:
        other = proof.other_base
        lines.append(f"  of it by the original base           mean {other.mean:.2g}, max {other.max:.2g}")
    if proof.recorded is not None:
        lines.append(
            f"  the policy against its run's record  mean {proof.recorded.mean:.2g}, max {proof.recorded.max:.2g} "
            "(float32 here, the run's arithmetic there)"
        )
    if proof.moved.max <= LIMIT:
        lines.append(
            "  warning: training moved these tokens less than the limit, so they cannot tell its weights apart"
        )
    return lines


def _rounding_lines(options: ExportOptions, survival: Survival | None) -> list[str]:
    if survival is None:
        return []
    if math.isnan(survival.share):
        return ["warning: the adapter changes nothing, its B is zero: the folder holds the base"]
    lines = [
        f"rounding: {options.dtype}, {options.rounding}, keeps {100 * survival.share:.1f}% of the adapter's change "
        f"(relative error {survival.relative_error:.2g})"
    ]
    if options.rounding == STOCHASTIC:
        lines[0] += ": a sum goes up or down by chance, drawn from the fingerprint, so that small changes are not lost"
    elif survival.share < 1 - _MOST_LOST:
        lines.append(
            f"warning: {100 * (1 - survival.share):.0f}% of what was trained is lost, being less than half a step of "
            f"{options.dtype}; --rounding stochastic, the default, keeps it in expectation, with noise, --dtype "
            "float32 and --format adapter keep it exactly"
        )
    return lines
