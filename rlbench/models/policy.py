"""The trained policy: the shared base with a LoRA adapter, seen as hidden states of a packed microbatch.

Shapes: T packed tokens, N loss positions, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlbench import progress
from rlbench.config.schema import LoraConfig, TrainingConfig
from rlbench.data.packing import Microbatch
from rlbench.models.adapter import Adapter
from rlbench.models.adapter_casts import cast_together
from rlbench.models.attention import PackedAttention, use_rlbench_attention
from rlbench.models.base import output_softcap, output_weight, share_base
from rlbench.models.lora import add_lora, export_adapter
from rlbench.models.lora_dropout import ForwardCounter, forward_of
from rlbench.models.model_folder import share_mode
from rlbench.models.patch import KernelLayer, describe, is_patch_useful, patch_model
from rlbench.models.recompute import set_recompute
from rlbench.models.warm_start import find_adapter
from rlbench.models.weights import Weights

ADAPTER_FOLDER = "adapter"


class Policy:
    """Base plus adapter. The reference policy is the same base with the adapter switched off.

    `rlbench.models.full_policy` has the one whose every weight is trained.
    """

    _training_forwards: ForwardCounter | None = None  # None: no dropout

    def __init__(self, base: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
        """
        Args:
            base: frozen model whose tensors are shared; its modules are not changed.
            lora: the `lora` part of the config.
            seed: of the adapter's initial weights, where `lora.init_from` names none, and of its dropout.

        Raises:
            ValueError: `lora.init_from` names no adapter that fits.
        """
        if lora.dropout:
            self._training_forwards = ForwardCounter(seed)
        tree = share_base(base)
        use_rlbench_attention(tree)
        self.model: PeftModel = add_lora(tree, lora, seed=seed)
        self._tree = tree
        start = find_adapter(lora)
        if start is not None:
            self.load_adapter(start)
        self.head_weight = output_weight(tree)  # [V, D]
        self.softcap = output_softcap(tree)  # of the logits
        self.patched = ""  # which modules compute through kernels
        if is_patch_useful(self.device):
            self.patched = describe(patch_model(tree, tree.config.get_text_config().model_type))
            cast_together(tree, self.head_weight.dtype)

    def set_recompute(self, config: TrainingConfig) -> None:
        """Compute activations again in the backward pass, see `rlbench.models.recompute`.

        Args:
            config: the `training` part of the config, recompute derived.

        Raises:
            ValueError: the layers cannot do that.
        """
        set_recompute(self._tree, config.recompute, config.recompute_layers, offload=config.offload)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def has_kernel_layers(self) -> bool:
        """Whether whole decoder layers compute through kernels."""
        return any(isinstance(module, KernelLayer) for module in self._tree.modules())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by name, in a stable order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters, in a stable order."""
        return [parameter for _, parameter in self.named_parameters()]

    def table_parameters(self) -> list[nn.Parameter]:
        """Those of `parameters` that are tables of the vocabulary: embeddings and the head."""
        return []

    def hidden(self, microbatch: Microbatch) -> Tensor:
        """Final hidden states [N, D] at the positions that predict the microbatch's targets.

        With gradient, and in a rehearsal, lora.dropout is applied; each call of a step has masks of its own.
        """
        context = PackedAttention(microbatch.layout, self.head_weight.dtype)
        counter = self._training_forwards
        with forward_of(counter.next() if counter else None):
            output = self._tree.base_model(
                input_ids=microbatch.token_ids[None],
                position_ids=microbatch.position_ids[None],
                use_cache=False,
                attention_context=context,
            )
        progress.mark()
        return output.last_hidden_state.squeeze(0)[microbatch.predict_rows]

    def begin_step(self, step: int) -> None:
        """Let the masks of dropout be those of an optimizer step, from 1, whatever was computed before."""
        if self._training_forwards:
            self._training_forwards.begin_step(step)

    def rehearsal(self) -> AbstractContextManager[None]:
        """Inside, forwards without gradient drop what as many forwards with gradient, made after it, will drop."""
        return self._training_forwards.rehearsal() if self._training_forwards else nullcontext()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `hidden` is that of the reference policy, without gradient."""
        with self.model.disable_adapter(), torch.no_grad():
            yield

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Be told of its steps; nothing to do where the optimizer writes what `hidden` reads."""
        del optimizer

    def adapter(self) -> Adapter:
        """Live adapter tensors."""
        return export_adapter(self.model)

    def weights(self) -> Adapter | Weights:
        """Live tensors of all that is trained, for `Engine.sync`."""
        return self.adapter()

    def save(self, folder: Path, base_name: str) -> None:
        """Write all that is trained into a folder of its own below `folder`, so that `load` gives it back bit for bit.

        Args:
            folder: of a checkpoint.
            base_name: as in `save_adapter`.
        """
        self.save_adapter(folder / ADAPTER_FOLDER, base_name)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote.

        Raises:
            ValueError: it does not fit.
        """
        self.load_adapter(folder / ADAPTER_FOLDER)

    def save_result(self, run_folder: Path, base_name: str) -> Path:
        """Write what a run leaves for others to use; returns its folder."""
        self.save_adapter(run_folder / ADAPTER_FOLDER, base_name)
        return run_folder / ADAPTER_FOLDER

    def save_adapter(self, folder: Path, base_name: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, loadable by `peft.PeftModel.from_pretrained`.

        Args:
            folder: made if absent.
            base_name: hub id or path of the base, recorded in adapter_config.json.
        """
        self.model.peft_config["default"].base_model_name_or_path = base_name
        # PEFT would ask the hub whether the vocabulary was changed; it never is.
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        share_mode(folder, "adapter_config.json")

    def load_adapter(self, folder: Path) -> None:
        """Take over the tensors of `save_adapter`, bit for bit.

        Raises:
            ValueError: names or shapes differ from this policy's adapter.
        """
        saved = load_file(str(folder / "adapter_model.safetensors"))
        own = get_peft_model_state_dict(self.model)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise ValueError(
                f"the adapter in {folder} has other tensors than this run's; expected equal lora.* settings"
            )
        set_peft_model_state_dict(self.model, saved)
