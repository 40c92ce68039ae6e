"""What an exported folder says of itself: rlbench_export.json for programs, README.md as a model card."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rlbench
from rlbench.commands.export_run import ADAPTER, MERGED, ORIGINAL
from rlbench.commands.export_weights import ExportJob, Proof
from rlbench.config.full_training import FULL
from rlbench.tracking.jsonl import read_metrics

RECORD_NAME = "rlbench_export.json"


def write_record(job: ExportJob, proof: Proof, folder: Path) -> None:
    """rlbench_export.json: what was exported and what was measured."""
    options, survival = job.options, proof.survival
    is_merge = survival is not None
    record = {
        "rlbench": rlbench.__version__,
        "run": job.config.name,
        "step": job.weights.step,
        "fingerprint": proof.fingerprint,
        "fingerprint_is_compared": bool(job.weights.fingerprint),  # with what the run recorded
        "format": options.format,
        "model": job.model.name,
        "base": options.base if is_merge else None,
        "dtype": options.dtype,
        "rounding": options.rounding if is_merge else None,
        "survived_share": _number(survival.share) if survival else None,
        "relative_error": _number(survival.relative_error) if survival else None,
        "proof": {
            "tokens": proof.probe.origin,
            "num_tokens": proof.probe.num_tokens,
            **{
                f"{name}_nats": None if found is None else asdict(found)
                for name, found in {
                    "policy_gap": proof.policy,
                    "folder_gap": proof.folder,
                    "training_moved": proof.moved,
                    "recorded_gap": proof.recorded,
                    "original_base_gap": proof.other_base,
                }.items()
            },
        },
    }
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")


def write_card(job: ExportJob, proof: Proof, folder: Path) -> None:
    """README.md with what is on record, and nothing else."""
    name = job.options.destination.name
    parts = [_front_matter(job), f"# {name}\n", _what(job), _measured(job, proof), _settings(job, proof), _use(job)]
    (folder / "README.md").write_text("\n".join(part for part in parts if part))


def eval_metrics(job: ExportJob) -> dict[str, float]:
    """Of the evaluation after the exported step; empty if there was none."""
    file = job.options.run_folder / "metrics.jsonl"
    lines = read_metrics(file, "eval") if file.is_file() else []
    found = [line for line in lines if line["step"] == job.weights.step]
    return {key: value for key, value in (found[-1] if found else {}).items() if isinstance(value, float)}


def _front_matter(job: ExportJob) -> str:
    lines = [f"library_name: {'peft' if job.options.format == ADAPTER else 'transformers'}", "tags:", "- rlbench"]
    if not Path(job.model.name).expanduser().exists():
        lines.insert(0, f"base_model: {job.model.name}")
    return "\n".join(["---", *lines, "---", ""])


def _what(job: ExportJob) -> str:
    config, options = job.config, job.options
    kind = {"rl": f"{config.algorithm.loss} loss, {config.algorithm.advantage} advantages", "sft": "given answers"}
    how = kind.get(config.stage, f"losses: {', '.join(config.preference.losses)}")
    lora = config.lora
    scale = "alpha / sqrt(rank)" if lora.rslora else "alpha / rank"
    adapter = f"a LoRA adapter (rank {lora.rank}, alpha {lora.alpha:g}, scale {scale}, on {lora.targets})"
    trained = "all weights" if config.training.parameters == FULL else adapter
    text = f"{job.model.name}, trained by rlbench (stage {config.stage}, {how}): {trained}, after {job.weights.step} "
    text += f"of {config.training.num_steps} steps.\n"
    if options.format == MERGED and config.training.parameters != FULL:
        text += f"\nThe adapter is merged: W + scale * B A in float32, rounded once to {options.dtype}"
        text += f" ({options.rounding}).\n" if options.dtype != "float32" else ".\n"
        text += _base_sentence(job)
    return text


def _base_sentence(job: ExportJob) -> str:
    quantization = job.config.model.quantization
    if job.options.base == ORIGINAL:
        return f"\nW are the checkpoint's own weights; trained on were those that {_as_trained(job)}.\n"
    return "" if quantization == "none" else f"\nW are the weights that {_as_trained(job)}, made dense.\n"


def _as_trained(job: ExportJob) -> str:
    model = job.config.model
    return f"are in {model.dtype}" if model.quantization == "none" else f"{model.quantization} leaves of them"


def _measured(job: ExportJob, proof: Proof) -> str:
    lines = ["## Measured\n", "| | |", "|---|---|"]
    metrics = eval_metrics(job)
    if "eval/accuracy" in metrics:
        interval = ""
        if "eval/accuracy_low" in metrics:
            low, high = 100 * metrics["eval/accuracy_low"], 100 * metrics["eval/accuracy_high"]
            interval = f" (95% interval {low:.1f}% to {high:.1f}%)"
        number = f"{100 * metrics['eval/accuracy']:.1f}%{interval}, {metrics['eval/num']:.0f} held-out problems, greedy"
        lines.append(f"| accuracy of the run's policy at this step, by the run | {number} |")
    where = f"{proof.probe.num_tokens} tokens, {proof.probe.origin}"
    lines.append(
        f"| gap of this folder's logprobs to the run's policy, both in float32 ({where}) | mean "
        f"{proof.policy.mean:.2g}, max {proof.policy.max:.2g} nats |"
    )
    lines.append(f"| what training changed of them | mean {proof.moved.mean:.2g}, max {proof.moved.max:.2g} nats |")
    if proof.survival is not None and not math.isnan(proof.survival.share):
        share, error = proof.survival.share, proof.survival.relative_error
        lines.append(
            f"| share of the adapter's change that {job.options.dtype} kept | {share:.3f}, relative error {error:.2g} |"
        )
    return "\n".join(lines) + "\n"


def _settings(job: ExportJob, proof: Proof) -> str:
    config = job.config
    rows: dict[str, Any] = {
        "data.path" if config.data.path else "data.name, data.source": (
            config.data.path or f"{config.data.name}, {config.data.source}"
        ),
        "base, as it was found for this folder": job.model.description,
        "model.dtype, model.quantization": f"{config.model.dtype}, {config.model.quantization}",
        "optim.lr": config.optim.lr,
        "seed": config.seed,
        "fingerprint of the trained weights": (
            proof.fingerprint + ("" if job.weights.fingerprint else " (not compared: the run left none that can be)")
        ),
    }
    if config.stage == "rl":
        rows["algorithm.prompts_per_step x group_size"] = (
            f"{config.algorithm.prompts_per_step} x {config.algorithm.group_size}"
        )
        rows["rewards"] = ", ".join(config.rewards.components)
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["## Run\n", "| | |", "|---|---|", *lines, ""])


def _use(job: ExportJob) -> str:
    if job.options.format == ADAPTER:
        code = f'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")  # its base: {job.base_name}'
        library, serve = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer", ""
    else:
        code = f'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="{job.options.dtype}")'
        library, serve = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "\nWith vLLM: `vllm serve FOLDER`\n",
        )
    return (
        f'## Load\n\n```python\n{library}\n\n{code}\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n{serve}'
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
