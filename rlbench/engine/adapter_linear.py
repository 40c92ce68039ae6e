"""A frozen linear layer with an engine's own copy of a LoRA update."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rlbench.models.adapter import Adapter


class AdapterLinear(nn.Module):
    """`y = x W^T + b + (x A^T) (s B)^T`; inference only. Shares `weight` and `bias` with the layer it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight  # [out, in]
        self.bias = linear.bias
        self.lora_a: Tensor | None = None  # [R, in]
        self.lora_b: Tensor | None = None  # [out, R], scaling folded in
        self.use_adapter = True

    def load(self, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        """Copy float32 [R, in] and [out, R] into the layer's dtype; the scaling is folded into B before the cast."""
        place = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.lora_a = lora_a.detach().to(**place, copy=True)
        self.lora_b = (lora_b.detach() * scaling).to(**place, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.lora_a is None or self.lora_b is None or not self.use_adapter:
            return y
        low_rank = F.linear(x.flatten(0, -2), self.lora_a)  # [N, R]
        y.view(-1, y.shape[-1]).addmm_(low_rank, self.lora_b.T)
        return y


class AdapterSlots:
    """All adaptable linear layers of an engine's module tree, by module path."""

    def __init__(self, model: nn.Module) -> None:
        """Replace every linear layer but the output head of `model` by an `AdapterLinear`."""
        self._slots: dict[str, AdapterLinear] = {}
        head = model.get_output_embeddings()  # type: ignore[operator]
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                self._slots[name] = AdapterLinear(module)
                model.set_submodule(name, self._slots[name])

    def load(self, adapter: Adapter) -> None:
        """Copy all tensors of the adapter; layers that it does not name lose theirs.

        Raises:
            ValueError: if it names an unknown module or a shape does not fit; nothing is changed then.
        """
        self._check(adapter)
        for name, slot in self._slots.items():
            slot.lora_a = slot.lora_b = None
            if name in adapter.lora_a:
                slot.load(adapter.lora_a[name], adapter.lora_b[name], adapter.scaling)

    def _check(self, adapter: Adapter) -> None:
        if set(adapter.lora_a) != set(adapter.lora_b):
            raise ValueError(f"adapter has A or B alone for {sorted(set(adapter.lora_a) ^ set(adapter.lora_b))}")
        unknown = sorted(set(adapter.lora_a) - set(self._slots))
        if unknown:
            raise ValueError(f"adapter names {unknown[0]!r} and {len(unknown) - 1} more modules unknown to the base")
        for name, lora_a in adapter.lora_a.items():
            lora_b, weight = adapter.lora_b[name], self._slots[name].weight
            rank = lora_a.shape[0]
            expected = [(rank, weight.shape[1]), (weight.shape[0], rank)]
            if [tuple(lora_a.shape), tuple(lora_b.shape)] != expected:
                raise ValueError(
                    f"adapter of {name}: A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}, expected {expected}"
                )

    def enable(self, use_adapter: bool) -> None:
        for slot in self._slots.values():
            slot.use_adapter = use_adapter
