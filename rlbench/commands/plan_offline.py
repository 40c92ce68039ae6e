"""The plan of a run on given completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlbench.build import BaseInputs
from rlbench.build_offline import PreferenceInputs, SftInputs
from rlbench.commands.plan import loss_rows, lr_row, model_rows, recompute_keys, row_maker, source_rows
from rlbench.data.preferences import PreferenceRow
from rlbench.records import TrainingSample
from rlbench.tracking.console import PlanRow


def sft_plan_rows(inputs: SftInputs, run_folder: Path) -> list[PlanRow]:
    """Rows of the plan by section: model, data, sizes, files."""
    row, train = row_maker(inputs), inputs.train
    rows = [
        PlanRow("Data", "columns read", train.format),
        PlanRow("Data", "training rows", f"{len(train.samples)}, the longest has {train.longest_tokens} tokens"),
        _held_out_row(train.samples, inputs.evaluation.samples if inputs.evaluation else ()),
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
        _held_out_row(train.rows, inputs.evaluation.rows if inputs.evaluation else ()),
    ]
    if train.num_too_long:
        rows.append(PlanRow("Data", "too long, left out", str(train.num_too_long)))
    return rows


def _held_out_row(
    train: Sequence[TrainingSample | PreferenceRow], held_out: Sequence[TrainingSample | PreferenceRow]
) -> PlanRow:
    """How many, and how many of them are no unseen rows."""
    trained = set(map(_tokens, train))
    num_trained = sum(_tokens(row) in trained for row in held_out)
    note = f"{num_trained} of them are training rows too, so their loss is not of unseen rows" if num_trained else ""
    return PlanRow("Data", "held-out rows", str(len(held_out)), note)


def _tokens(row: TrainingSample | PreferenceRow) -> tuple[Any, ...]:
    """Prompt, and the completion that is trained on or both that are compared."""
    if isinstance(row, TrainingSample):
        return row.prompt_token_ids, row.token_ids
    completions = row.completions[:1] if row.is_desirable is not None else row.completions
    return row.prompt_token_ids, completions


def size_rows(inputs: BaseInputs) -> list[PlanRow]:
    row = row_maker(inputs)
    keys = ("hardware.profile", "hardware.num_threads", "training.num_steps", "training.tokens_per_microbatch",
            *recompute_keys(inputs), "evaluation.num_prompts")  # fmt: skip
    return [*(row("Sizes", key) for key in keys), lr_row(inputs)]


def files_row(run_folder: Path) -> PlanRow:
    return PlanRow("Files", "run folder", str(run_folder))
