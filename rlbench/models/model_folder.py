"""A model folder that transformers loads: config, weights in one safetensors file, and the tokenizer's files."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

WEIGHTS_FILE = "model.safetensors"
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "generation_config.json",
)  # fmt: skip


def share_mode(folder: Path, like: str) -> None:
    """Let all who may read `folder / like` read the safetensors files too, whose writer keeps them to their owner."""
    mode = (folder / like).stat().st_mode & 0o777
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


def write_model(folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Write `folder` anew, loadable by `AutoModelForCausalLM.from_pretrained` and as `model.path`.

    Args:
        folder: made if absent.
        model: whose config is written.
        weights: by the names of the model's parameters, of any dtype; a tied head is left out.
        source: the folder that the model came from; its tokenizer and chat template are copied, if it is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # clones: safetensors refuses tensors that are rows of one memory
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(str(folder))
    share_mode(folder, "config.json")
    origin = Path(source)
    if source and origin.is_dir() and origin.resolve() != folder.resolve():
        for pattern in _BESIDE:
            for file in origin.glob(pattern):
                shutil.copyfile(file, folder / file.name)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """What `write_model` wrote, on the host.

    Raises:
        ValueError: there is no such file.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{file} is not there; expected a checkpoint of a run with training.parameters=full")
    return load_file(str(file))
