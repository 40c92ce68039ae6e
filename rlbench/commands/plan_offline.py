"""The plan of a run on given completions."""

from __future__ import annotations

from pathlib import Path

from rlbench.build import BaseInputs
from rlbench.build_offline import PreferenceInputs, SftInputs
from rlbench.commands.plan import loss_rows, lr_row, model_rows, recompute_keys, row_maker, source_rows
from rlbench.tracking.console import PlanRow


def sft_plan_rows(inputs: SftInputs, run_folder: Path) -> list[PlanRow]:
    """Rows of the plan by section: model, data, sizes, files."""
    row, train = row_maker(inputs), inputs.train
    rows = [
        PlanRow("Data", "columns read", train.format),
        PlanRow("Data", "training rows", f"{len(train.samples)}, the longest has {train.longest_tokens} tokens"),
        PlanRow("Data", "held-out rows", str(len(inputs.evaluation.samples) if inputs.evaluation else 0)),
        row("Data", "sft.loss_on"),
    ]
    if train.num_too_long:
        rows.append(PlanRow("Data", "too long, left out", str(train.num_too_long)))
    rows = model_rows(inputs) + source_rows(inputs) + rows
    return rows + [row("Sizes", "sft.rows_per_step"), *size_rows(inputs), files_row(run_folder)]


def preference_plan_rows(inputs: PreferenceInputs, run_folder: Path) -> list[PlanRow]:
    """Rows of the plan by section: model, data, losses, sizes, files."""
    rows = model_rows(inputs) + source_rows(inputs) + _pair_rows(inputs) + loss_rows(inputs)
    return rows + [row_maker(inputs)("Sizes", "preference.pairs_per_step"), *size_rows(inputs), files_row(run_folder)]


def reward_model_plan_rows(inputs: PreferenceInputs, run_folder: Path) -> list[PlanRow]:
    """Rows of the plan by section: model, data, loss, sizes, files."""
    row = row_maker(inputs)
    num_margins = sum(pair.margin != 0 for pair in inputs.train.rows)
    rows = model_rows(inputs) + source_rows(inputs) + _pair_rows(inputs)
    rows += [PlanRow("Loss", "pairs with a margin", str(num_margins)), row("Loss", "reward_model.centering_coef")]
    return rows + [row("Sizes", "reward_model.pairs_per_step"), *size_rows(inputs), files_row(run_folder)]


def _pair_rows(inputs: PreferenceInputs) -> list[PlanRow]:
    train = inputs.train
    made = train.format == f"{inputs.config.data.prompt_column} and {inputs.config.data.answer_column}"
    note = "pairs are MADE: the answer, and the answer with its last number changed" if made else ""
    rows = [
        PlanRow("Data", "columns read", train.format, note),
        PlanRow("Data", "training rows", f"{len(train.rows)}, the longest packs to {train.longest_tokens} tokens"),
        PlanRow("Data", "held-out rows", str(len(inputs.evaluation.rows) if inputs.evaluation else 0)),
    ]
    if train.num_too_long:
        rows.append(PlanRow("Data", "too long, left out", str(train.num_too_long)))
    return rows


def size_rows(inputs: BaseInputs) -> list[PlanRow]:
    row = row_maker(inputs)
    keys = ("hardware.profile", "hardware.num_threads", "training.num_steps", "training.tokens_per_microbatch",
            *recompute_keys(inputs), "evaluation.num_prompts")  # fmt: skip
    return [*(row("Sizes", key) for key in keys), lr_row(inputs)]


def files_row(run_folder: Path) -> PlanRow:
    return PlanRow("Files", "run folder", str(run_folder))
