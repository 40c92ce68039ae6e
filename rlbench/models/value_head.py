"""PPO's critic: a second adapter and a linear value head on the tensors of the same base.

Shapes: N loss positions, D hidden.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlbench.config.schema import LoraConfig, TrainingConfig
from rlbench.data.packing import Microbatch
from rlbench.models.policy import Policy

_HEAD_FILE = "value_head.safetensors"


class Critic:
    """V(state) = head(hidden state that predicts the token), so the token that is judged is never seen.

    The adapter is made as the policy's (`lora.init_from` too) in a module tree of its own: the policy's parameters
    take no part. The head is float32 and starts at zero, so all values do.
    """

    def __init__(self, base: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
        """
        Args:
            base: frozen model whose tensors are shared.
            lora: the `lora` part of the config.
            seed: of the adapter's initial weights.
        """
        self._backbone = Policy(base, lora, seed=seed)
        self.head = nn.Linear(self._backbone.head_weight.shape[1], 1, dtype=torch.float32, device=self.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def device(self) -> torch.device:
        return self._backbone.device

    def set_recompute(self, config: TrainingConfig) -> None:
        """As `Policy.set_recompute`."""
        self._backbone.set_recompute(config)

    def values(self, microbatch: Microbatch) -> Tensor:
        """float32 [N]: the value of the state before each target is drawn."""
        return self.head(self._backbone.hidden(microbatch).float())[:, 0]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by name, in a stable order."""
        head = [(f"value_head.{name}", parameter) for name, parameter in self.head.named_parameters()]
        return self._backbone.named_parameters() + head

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters, in a stable order."""
        return [parameter for _, parameter in self.named_parameters()]

    def save_adapter(self, folder: Path, base_name: str) -> None:
        """Adapter in PEFT's format, the head beside it."""
        self._backbone.save_adapter(folder, base_name)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(head, str(folder / _HEAD_FILE))

    def load_adapter(self, folder: Path) -> None:
        """Take over the tensors of `save_adapter`, bit for bit.

        Raises:
            ValueError: they do not fit this critic.
        """
        self._backbone.load_adapter(folder)
        self.head.load_state_dict(load_file(str(folder / _HEAD_FILE)))
