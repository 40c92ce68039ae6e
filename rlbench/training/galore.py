"""GaLore: AdamW of matrices in a low-rank subspace of their gradients, so that the moments are small."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlbench.models.moments import is_matrix, low_shape

_OWN = ("basis", "age", "interval")  # of the state: of the projection; all else is the inner optimizer's
MakeAdamW = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class GaloreAdamW(torch.optim.Optimizer):
    """Projects the gradients of matrices, lets AdamW update in the subspace, and projects its update back.

    Of G [m, n] with m <= n, R = P^T G [r, n] goes through AdamW and P N changes the weight, N being AdamW's update of
    R; with m > n, R = G P and N P^T. P [min(m, n), r] holds the leading eigenvectors of G G^T (or G^T G), which are G's
    singular vectors, drawn anew every `interval` updates. Moments stay as they are when P changes. Weight decay acts on
    the whole matrix.

    The moments are those of a library's AdamW over stand-ins of R's shape: in float32 torch's, in 8 bits bitsandbytes'.
    (pytorch_optimizer 4.1 has a GaLore of its own; its projectors are no tensors of the state, so that a checkpoint
    would not hold them, and it has no 8-bit moments.)

    Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2; the interval that grows, Zhang et al. 2024 (Q-GaLore),
    arXiv:2407.08296, section 3.2, there by the cosine between old and new vectors, here by `likeness`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make_adamw: MakeAdamW,
        *,
        rank: int,
        interval: int,
        threshold: float | None,
        scale: float,
        others: Collection[nn.Parameter] = (),
        **adamw: Any,
    ) -> None:
        """
        Args:
            parameters: all that are trained, float32.
            make_adamw: of parameter groups; its weight decay holds for what is not projected.
            rank: r. Matrices whose shorter side is not above it are AdamW's as they are.
            interval: updates between two projections, at first.
            threshold: the interval of a matrix doubles whenever its new subspace is at least this like the old one
                (`likeness`); None: it stays.
            scale: of the updates. At 1 they are no larger than AdamW's would be.
            others: matrices that are not projected: embeddings and the head.
            adamw: lr, betas, eps, weight_decay.

        Raises:
            ValueError: no matrix has both sides above `rank`.
        """
        left_out = {id(parameter) for parameter in others}
        matrices = [p for p in parameters if is_matrix(p.shape) and min(p.shape) > rank and id(p) not in left_out]
        if not matrices:
            shapes = sorted({tuple(p.shape) for p in parameters if is_matrix(p.shape) and id(p) not in left_out})[:4]
            raise ValueError(
                f"optim.galore.rank is {rank}, but no trained matrix is larger both ways (some are {shapes}), so "
                "GaLore would change nothing; expected a lower rank, training.parameters=full or another optim.name"
            )
        super().__init__(list(parameters), adamw)
        self._rank, self._interval, self._threshold, self._scale = rank, interval, threshold, scale
        self._stand_ins = {p: nn.Parameter(p.new_empty(low_shape(p.shape, rank))) for p in matrices}
        rest = [p for p in parameters if p not in self._stand_ins]
        groups = [{"params": rest}] if rest else []
        self._inner = make_adamw([*groups, {"params": list(self._stand_ins.values()), "weight_decay": 0.0}])
        self._rest = rest
        is_fused = bool(self._inner.param_groups[0].get("fused"))
        self.param_groups[0]["fused"] = is_fused  # where the step's count lives, for a checkpoint

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        lr, weight_decay = (self.param_groups[0][key] for key in ("lr", "weight_decay"))
        for group in self._inner.param_groups:
            group["lr"] = lr
        for parameter in self._rest:
            _share(self.state, parameter, self._inner.state, parameter)
        projected = []
        for matrix, stand_in in self._stand_ins.items():
            if matrix.grad is not None:
                projected.append((matrix, stand_in, self._project(matrix, stand_in)))
                _share(self.state, matrix, self._inner.state, stand_in)
        self._inner.step()
        for parameter in self._rest:
            if self._inner.state.get(parameter):
                self.state[parameter] = self._inner.state[parameter]
        for matrix, stand_in, own in projected:
            self.state[matrix] = {**self._inner.state[stand_in], **own}
            matrix.mul_(1 - lr * weight_decay).add_(_back(stand_in, own["basis"], matrix.shape), alpha=self._scale)
            stand_in.grad = None
        return None

    def _project(self, matrix: nn.Parameter, stand_in: nn.Parameter) -> dict[str, Any]:
        """Make the stand-in zero, with the projected gradient as its own; returns the projection's state."""
        assert matrix.grad is not None
        state = self.state.get(matrix, {})
        own = {key: state[key] for key in _OWN if key in state}
        own["age"] = int(own.get("age", 0)) + 1  # updates with this basis
        own["interval"] = int(own.get("interval", self._interval))
        if "basis" not in own or own["age"] > own["interval"]:
            found = leading_basis(matrix.grad, self._rank)
            if "basis" in own and self._threshold is not None:
                own["interval"] *= 2 if likeness(own["basis"], found) >= self._threshold else 1
            own["basis"], own["age"] = found, 1
        stand_in.zero_()
        stand_in.grad = _low(matrix.grad, own["basis"])
        return own


def leading_basis(gradient: Tensor, rank: int) -> Tensor:
    """float32 [min(m, n), rank]: singular vectors of the largest singular values, on the shorter side.

    From the eigenvectors of the smaller Gram matrix, which cost far less than all singular vectors. The largest
    entry of each is positive, so that moments mean the same after another projection that finds the same vector.
    """
    gradient = gradient.float()
    gradient = gradient / gradient.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # squares stay in range
    is_wide = gradient.shape[0] <= gradient.shape[1]
    gram = gradient @ gradient.T if is_wide else gradient.T @ gradient
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # ascending
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors).contiguous()


def likeness(old: Tensor, new: Tensor) -> float:
    """Of the subspaces of two orthonormal bases [m, r]: 1 if they are the same, 0 as of two by chance.

    ||old^T new||_F^2 / r is the share of one that lies in the other, r / m by chance.
    """
    length, rank = new.shape
    share, chance = float((old.T @ new).square().sum()) / rank, rank / length
    return (share - chance) / (1 - chance)


def _low(gradient: Tensor, basis: Tensor) -> Tensor:
    return basis.T @ gradient if gradient.shape[0] <= gradient.shape[1] else gradient @ basis


def _back(update: Tensor, basis: Tensor, shape: Sequence[int]) -> Tensor:
    return basis @ update if shape[0] <= shape[1] else update @ basis.T


def _share(state: Any, parameter: nn.Parameter, inner: Any, stand_in: nn.Parameter) -> None:
    """Hand the inner optimizer its part of the state: of this run, or of a checkpoint that was put back."""
    kept = {key: value for key, value in state.get(parameter, {}).items() if key not in _OWN}
    if kept:
        inner[stand_in] = kept
