"""PPO's critic: a second adapter and a linear value head on the tensors of the same base; heads as files.

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
from rlbench.models.policy import ADAPTER_FOLDER, Policy

HEAD_FILE = "value_head.safetensors"
_SCALE = "scale"


def make_head(like: Tensor) -> nn.Linear:
    """A linear head to one number, float32, at zero.

    Args:
        like: [V, D] on the device of the model.
    """
    head = nn.Linear(like.shape[1], 1, dtype=torch.float32, device=like.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def save_head(folder: Path, head: nn.Linear, scale: tuple[float, float] | None = None) -> None:
    """Write the head, and mean and standard deviation of its values where they are known."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    if scale is not None:
        tensors[_SCALE] = torch.tensor(scale, dtype=torch.float64)
    save_file(tensors, str(folder / HEAD_FILE))


def load_head(folder: Path, head: nn.Linear) -> tuple[float, float] | None:
    """Take over what `save_head` wrote; returns the scale."""
    tensors = load_file(str(folder / HEAD_FILE))
    scale = tensors.pop(_SCALE, None)
    head.load_state_dict(tensors)
    return None if scale is None else (float(scale[0]), float(scale[1]))


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
        self.head = make_head(self._backbone.head_weight)

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

    def save(self, folder: Path, base_name: str) -> None:
        """As `Policy.save`."""
        self.save_adapter(folder / ADAPTER_FOLDER, base_name)

    def load(self, folder: Path) -> None:
        """As `Policy.load`."""
        self.load_adapter(folder / ADAPTER_FOLDER)

    def save_adapter(self, folder: Path, base_name: str) -> None:
        """Adapter in PEFT's format, the head beside it."""
        self._backbone.save_adapter(folder, base_name)
        save_head(folder, self.head)

    def load_adapter(self, folder: Path) -> None:
        """Take over the tensors of `save_adapter`, bit for bit.

        Raises:
            ValueError: they do not fit this critic.
        """
        self._backbone.load_adapter(folder)
        load_head(folder, self.head)
