"""The plan that a run prints before it starts: what is done with what, and why each derived value is what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlbench.build import BaseInputs, Inputs
from rlbench.config.full_training import FULL, high_lr_note, needs_frozen_copy
from rlbench.config.schema import LoraConfig
from rlbench.data.prompts import longest_prompt_tokens
from rlbench.tracking.console import PlanRow


def plan_rows(inputs: Inputs, run_folder: Path) -> list[PlanRow]:
    """Rows of an online run's plan by section: model, data, rewards, sizes, files."""
    config = inputs.config
    row = row_maker(inputs)
    rows = model_rows(inputs) + source_rows(inputs) + _prompt_rows(inputs)
    rows += [
        PlanRow("Rewards", name, f"{component.path}, weight {component.weight:g}")
        for name, component in config.rewards.components.items()
    ]
    rows += [row("Rewards", "rewards.num_workers")]
    sizes = ("hardware.profile", "hardware.num_threads", "engine.kind", "engine.max_num_seqs", "training.num_steps",
             "algorithm.prompts_per_step", "algorithm.group_size", "sampling.max_tokens",
             "training.tokens_per_microbatch", *recompute_keys(inputs), "evaluation.num_prompts")  # fmt: skip
    rows += [*(row("Sizes", key) for key in sizes), lr_row(inputs)]
    rows.append(row("Sizes", "engine.share"))
    if config.engine.kind == "vllm":
        rows += [row("Sizes", f"engine.{name}") for name in ("kv_cache_gib", "kv_cache_dtype", "dense_copies")]
    rows += _pair_rows(inputs) if config.algorithm.pairs.is_on else _algorithm_rows(inputs)
    checks = ("identity_every_steps", "identity_tokens", "drift_warn_nats", "drift_stop_nats")
    rows += [row("Checks", f"checks.{name}") for name in checks]
    rows.append(PlanRow("Files", "run folder", str(run_folder)))
    return rows


def _algorithm_rows(inputs: Inputs) -> list[PlanRow]:
    row, config = row_maker(inputs), inputs.config.algorithm
    names = ("advantage", "loss", "normalization", "num_updates", *config.resolved_defaults())
    rows = [row("Algorithm", f"algorithm.{name}") for name in names]
    if config.has_teacher:
        teacher = config.teacher
        shown = [f"model {teacher.model}" if teacher.model else "the base"]
        shown += [f"adapter {teacher.adapter}"] if teacher.adapter else []
        rows.append(PlanRow("Algorithm", "algorithm.teacher", f"{', '.join(shown)}, gamma {teacher.gamma:g}"))
    kl = f"{config.kl_coef:g}" + ("" if config.kl_coef else " (no reference forward is made)")
    return [*rows, PlanRow("Algorithm", "algorithm.kl_coef", kl)]


def _pair_rows(inputs: Inputs) -> list[PlanRow]:
    row, config = row_maker(inputs), inputs.config
    pairs = config.algorithm.pairs
    rows = [PlanRow("Algorithm", "algorithm.pairs", f"{pairs.choice}, rewards differ by {pairs.min_gap:g} or more")]
    rows.append(row("Algorithm", "algorithm.num_updates"))
    return rows + loss_rows(inputs)


def loss_rows(inputs: BaseInputs) -> list[PlanRow]:
    """The preference losses and what they read."""
    row, config = row_maker(inputs), inputs.config.preference
    weights = [f"{weight:g} {name}" for name, weight, _ in config.weighted_losses()]
    defaults = config.resolved_defaults(has_warm_start=inputs.config.lora.init_from is not None)
    names = [name for name in (*defaults, "divergence", "wpo") if getattr(config, name) is not None]
    losses = [PlanRow("Loss", "preference.losses", " + ".join(weights))]
    return losses + [row("Loss", f"preference.{name}") for name in names]


def recompute_keys(inputs: BaseInputs) -> list[str]:
    """What is computed again in the backward pass; of how many layers, if not of all."""
    layers = ["training.recompute_layers"] if inputs.config.training.recompute_layers else []
    return ["training.recompute", *layers]


def row_maker(inputs: BaseInputs) -> Callable[[str, str], PlanRow]:
    """A function (section, key) -> the key's row with the reason of a derived value."""
    reasons = {d.key: d.reason for d in inputs.derived}

    def row(section: str, key: str) -> PlanRow:
        part, name = key.split(".")
        value = getattr(getattr(inputs.config, part), name)
        return PlanRow(section, key, str(value), f"derived: {reasons[key]}" if key in reasons else "")

    return row


def lr_row(inputs: BaseInputs) -> PlanRow:
    """optim.lr, with its reason, or what there is to say of one that is set."""
    row = row_maker(inputs)("Sizes", "optim.lr")
    return row if row.reason else replace(row, reason=high_lr_note(inputs.config))


def model_rows(inputs: BaseInputs) -> list[PlanRow]:
    row = row_maker(inputs)
    return [
        row("Model", "model.path"),
        PlanRow("Model", "found", str(inputs.model.folder), inputs.model.description),
        row("Model", "model.dtype"),
        row("Model", "model.quantization"),
        *(_full_rows(inputs) if inputs.config.training.parameters == FULL else _lora_rows(inputs.config.lora)),
    ]


def _lora_rows(lora: LoraConfig) -> list[PlanRow]:
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    return [
        PlanRow("Model", "lora", f"rank {lora.rank}, alpha {lora.alpha:g}, {lora.targets}{dropout}"),
        PlanRow("Model", "lora.init_from", lora.init_from or "none: random A, zero B"),
    ]


def _full_rows(inputs: BaseInputs) -> list[PlanRow]:
    masters = "float32 masters beside bfloat16" if inputs.config.model.dtype == "bfloat16" else "in float32"
    reason = needs_frozen_copy(inputs.config)
    copies = [PlanRow("Model", "frozen copy of the model", f"one, for {reason}")] if reason else []
    return [PlanRow("Model", "training.parameters", FULL, f"all weights, {masters}"), *copies]


def source_rows(inputs: BaseInputs) -> list[PlanRow]:
    rows = [PlanRow("Data", split, loaded.description) for split, loaded in inputs.rows.items()]
    for split, loaded in inputs.rows.items():
        if loaded.bad_rows:
            rows.append(
                PlanRow("Data", f"{split}, left out", f"{len(loaded.bad_rows)} rows", "; ".join(loaded.bad_rows[:3]))
            )
    return rows


def _prompt_rows(inputs: Inputs) -> list[PlanRow]:
    longest = longest_prompt_tokens(inputs.train.prompts)
    rows = [PlanRow("Data", "training prompts", f"{len(inputs.train.prompts)}, the longest has {longest} tokens")]
    if inputs.train.num_too_long:
        rows.append(PlanRow("Data", "too long, left out", str(inputs.train.num_too_long)))
    return [*rows, _held_out_row(inputs)]


def _held_out_row(inputs: Inputs) -> PlanRow:
    """How many, and what a reader of their accuracy has to know."""
    if inputs.evaluation is None:
        return PlanRow("Data", "held-out prompts", "0")
    trained = {prompt.token_ids for prompt in inputs.train.prompts}
    num_trained = sum(prompt.token_ids in trained for prompt in inputs.evaluation.prompts)
    remarks = [f"{num_trained} of them are training prompts too, so their accuracy is not of unseen problems"]
    remarks = remarks if num_trained else []
    if inputs.evaluation.num_too_long:
        remarks.append(f"{inputs.evaluation.num_too_long} more are too long and left out")
    return PlanRow("Data", "held-out prompts", str(len(inputs.evaluation.prompts)), "; ".join(remarks))
