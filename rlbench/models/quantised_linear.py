"""What the kernels take as the frozen matrix of a linear layer, whatever it is kept in."""

from __future__ import annotations

from torch import Tensor, nn

from rlbench.models.fp8_linear import Fp8Linear
from rlbench.models.nf4_linear import Nf4Linear
from rlbench_kernels import Fp8Weight, Nf4Weight


def frozen_weight(layer: nn.Module) -> Tensor | Nf4Weight | Fp8Weight:
    """[out, in], dense or quantised, of a linear layer."""
    if isinstance(layer, Nf4Linear):
        return layer.nf4
    return layer.fp8 if isinstance(layer, Fp8Linear) else layer.weight  # type: ignore[return-value]
