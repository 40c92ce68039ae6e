"""A reward model: an adapter and a linear head on the tensors of the base, one score a completion.

Shapes: N loss positions and B completions of one microbatch, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlbench.config.schema import LoraConfig
from rlbench.data.packing import Microbatch
from rlbench.models.policy import Policy
from rlbench.models.value_head import HEAD_FILE, load_head, make_head, save_head
from rlbench.models.warm_start import find_adapter


class RewardModel(Policy):
    """score = head(hidden state of the completion's last token). The head is float32 and starts at zero."""

    def __init__(self, base: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
        """
        Args:
            base: frozen model whose tensors are shared.
            lora: the `lora` part of the config; `init_from` may name a policy's adapter or a reward model's.
            seed: of the adapter's initial weights, where `lora.init_from` names none.

        Raises:
            ValueError: `lora.init_from` names no adapter that fits.
        """
        super().__init__(base, replace(lora, init_from=None), seed=seed)
        self.head = make_head(self.head_weight)
        self.scale: tuple[float, float] | None = None  # mean and standard deviation of held-out scores
        start = find_adapter(lora)
        if start is not None:
            self.load_adapter(start)

    def scores(self, microbatch: Microbatch) -> Tensor:
        """float32 [B].

        Args:
            microbatch: of samples `with_next_token`, so that the last real token is an input.
        """
        ends = torch.bincount(microbatch.sequence_ids, minlength=microbatch.num_sequences).cumsum(0) - 1  # [B]
        return self.head(self.hidden(microbatch)[ends].float())[:, 0]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by name, in a stable order."""
        head = [(f"value_head.{name}", parameter) for name, parameter in self.head.named_parameters()]
        return super().named_parameters() + head

    def save_adapter(self, folder: Path, base_name: str) -> None:
        """Adapter in PEFT's format, the head and the scale of the scores beside it."""
        super().save_adapter(folder, base_name)
        save_head(folder, self.head, self.scale)

    def load_adapter(self, folder: Path) -> None:
        """Take over the tensors of `save_adapter`, bit for bit; a folder without a head leaves the head as it is.

        Raises:
            ValueError: they do not fit this model.
        """
        super().load_adapter(folder)
        if (folder / HEAD_FILE).is_file():
            self.scale = load_head(folder, self.head)
