"""The policy whose every weight is trained, with float32 master weights where the model is in 16 bits.

The optimizer writes float32 masters; what `hidden` computes with is their rounding, made anew after each step in the
same memory, which an engine may share. Gradients of a microbatch are added to the masters' in float32 and freed, layer
by layer in the backward pass. Of a float32 model the parameters are their own masters.

A number of a bfloat16 model takes 18 bytes with AdamW: 2, master 4, gradient 4, moments 8.

Source: mixed precision with master weights, Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlbench.models.attention import use_rlbench_attention
from rlbench.models.base import output_softcap, output_weight, share_base, storage_bytes
from rlbench.models.model_folder import WEIGHTS_FILE, read_weights, write_model
from rlbench.models.patch import KernelNorm, describe, is_patch_useful, patch_model
from rlbench.models.policy import Policy
from rlbench.models.weights import Weights

MODEL_FOLDER = "model"


class FullPolicy(Policy):
    """All parameters of the base. The reference policy is a frozen copy of it, where one was given."""

    def __init__(self, base: PreTrainedModel, *, frozen: PreTrainedModel | None = None) -> None:
        """
        Args:
            base: dense; its tensors are trained in place, for all that share them. Its modules are not changed.
            frozen: a copy that nothing changes, see `frozen_copy`; None: there is no reference policy.

        Raises:
            ValueError: a parameter is quantised.
        """
        tree: Any = share_base(base)
        use_rlbench_attention(tree)
        self.model = self._tree = tree
        self.head_weight = output_weight(tree)  # [V, D]
        self.softcap = output_softcap(tree)  # of the logits
        self._source = base.name_or_path or ""
        self._weights = dict(tree.named_parameters())
        for name, weight in self._weights.items():
            if not weight.is_floating_point():
                raise ValueError(f"training.parameters is full, but {name} is {weight.dtype}; expected a dense model")
            weight.requires_grad_(True)
        self._masters = {name: _master(weight) for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            if weight is not self._masters[name]:
                weight.register_post_accumulate_grad_hook(partial(_hand_over, self._masters[name]))
        self.patched = ""
        if is_patch_useful(self.device):
            found = describe(patch_model(tree, tree.config.get_text_config().model_type, only=KernelNorm))
            self.patched = f"{found}; matrices by torch's own: the fused projections compute no gradient of theirs"
        self._frozen = None if frozen is None else _frozen_tree(frozen)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The float32 masters by name, in a stable order."""
        return list(self._masters.items())

    def table_parameters(self) -> list[nn.Parameter]:
        """Masters of embeddings and head; one if they are tied."""
        tables = {id(self._tree.get_input_embeddings().weight), id(self.head_weight)}
        return [self._masters[name] for name, weight in self._weights.items() if id(weight) in tables]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """After each of its steps round the masters to what `hidden` computes with."""
        optimizer.register_step_post_hook(lambda *_: self._round_masters())

    @torch.no_grad()
    def _round_masters(self) -> None:
        pairs = [(w, self._masters[name]) for name, w in self._weights.items() if w is not self._masters[name]]
        if pairs:
            weights, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(weights), list(masters))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `hidden` and `head_weight` are those of the frozen copy, without gradient."""
        assert self._frozen is not None, "needs_frozen_copy said that no reference is needed"
        own = self._tree, self.head_weight
        self._tree, self.head_weight = self._frozen, output_weight(self._frozen)
        try:
            with torch.no_grad():
                yield
        finally:
            self._tree, self.head_weight = own

    def beside_weights(self) -> dict[str, int]:
        """Bytes that are held besides the weights that `hidden` computes with, by what they are."""
        masters = storage_bytes(self._tree, nn.ParameterList(self._masters.values())) - storage_bytes(self._tree)
        frozen = 0 if self._frozen is None else storage_bytes(self._frozen)
        return {name: size for name, size in {"master weights": masters, "frozen copy": frozen}.items() if size}

    def weights(self) -> Weights:
        """Live tensors in the model's dtype, for `Engine.sync`."""
        return Weights(tensors={name: weight.detach() for name, weight in self._weights.items()})

    def save(self, folder: Path, base_name: str) -> None:
        """Write the masters as a float32 model into `model/`: of a 16-bit model twice its size."""
        del base_name
        write_model(folder / MODEL_FOLDER, self._tree, self._masters, self._source)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, bit for bit.

        Raises:
            ValueError: names or shapes differ from this model's.
        """
        saved = read_weights(folder / MODEL_FOLDER)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in self._masters.items()}:
            raise ValueError(
                f"{folder / MODEL_FOLDER / WEIGHTS_FILE} has other tensors than this run's model; expected equal "
                "model.path and training.parameters"
            )
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(saved[name])
        self._round_masters()

    def save_result(self, run_folder: Path, base_name: str) -> Path:
        """Write a model folder in the model's dtype, for `from_pretrained` and for `model.path`."""
        del base_name
        write_model(run_folder / MODEL_FOLDER, self._tree, self._weights, self._source)
        return run_folder / MODEL_FOLDER


def frozen_copy(base: PreTrainedModel) -> PreTrainedModel:
    """A second model with weights of its own, frozen; made before anything trains `base`."""
    return copy.deepcopy(base).requires_grad_(False)


def _frozen_tree(frozen: PreTrainedModel) -> PreTrainedModel:
    tree = share_base(frozen)
    use_rlbench_attention(tree)
    if is_patch_useful(output_weight(tree).device):
        patch_model(tree, tree.config.get_text_config().model_type)
    return tree


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())


def _hand_over(master: nn.Parameter, weight: Tensor) -> None:
    """Add a microbatch's gradient to the master's in float32, and free it."""
    grad, weight.grad = weight.grad, None
    assert grad is not None
    if master.grad is None:
        master.grad = grad.float()
    else:
        master.grad.add_(grad)
