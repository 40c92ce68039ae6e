"""What `doctor` asks of the machine it runs on. Nothing but the standard library is imported before it is asked for."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import sys
import tomllib
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rlbench

if TYPE_CHECKING:
    from rlbench.config.derive import HardwareFacts
    from rlbench.config.schema import RunConfig

EXPERIMENT = "grpo_gsm8k"
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Declared:
    """What the distribution asks for, as in its pyproject.toml."""

    python: str  # ">=3.11,<3.14"
    packages: tuple[str, ...]  # "torch>=2.11,<2.14"
    gpu_packages: tuple[str, ...]  # of the extra `gpu`


class Machine:
    """Every answer may raise whatever the asked library raises; tests plant others."""

    @cached_property
    def declared(self) -> Declared:
        """Of the checkout, else of the installed distribution."""
        file = Path(rlbench.__file__).resolve().parents[1] / "pyproject.toml"
        if file.is_file():
            project = tomllib.loads(file.read_text())["project"]
            extras = project["optional-dependencies"]
            return Declared(project["requires-python"], tuple(project["dependencies"]), tuple(extras["gpu"]))
        requires = [line.partition(";") for line in metadata.requires("rlbench") or []]
        gpu = tuple(name.strip() for name, _, marker in requires if "extra" in marker and "gpu" in marker)
        packages = tuple(name.strip() for name, _, marker in requires if "extra" not in marker)
        return Declared(metadata.metadata("rlbench")["Requires-Python"], packages, gpu)

    @property
    def python(self) -> str:
        return ".".join(map(str, sys.version_info[:3]))

    def version(self, distribution: str) -> str | None:
        """Installed version; None: not installed."""
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return None

    def load(self, module: str) -> Any:
        return importlib.import_module(module)

    def driver_cuda(self) -> tuple[int, int] | None:
        """The newest CUDA that the NVIDIA driver knows; None: no driver. Source: cuDriverGetVersion."""
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
        number = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
        return number.value // 1000, number.value % 1000 // 10

    @cached_property
    def facts(self) -> HardwareFacts:
        from rlbench.models.device import hardware_facts

        return hardware_facts("auto")

    @cached_property
    def config(self) -> RunConfig:
        """Of the experiment on this machine, as a run derives it."""
        from rlbench.config.compose import to_run_config
        from rlbench.config.derive import derive
        from rlbench.config.sources import compose_with_layers

        config = to_run_config(compose_with_layers([f"+exp={EXPERIMENT}"])[0])
        derive(config, self.facts)
        return config

    def memory_gib(self) -> float:
        """That a run could use on its device."""
        from rlbench.tracking.device_memory import device_memory

        try:
            return device_memory(self.config.hardware).limit() / GIB
        except ValueError:  # no /proc
            return self.facts.memory_gib

    def uses_triton(self) -> bool:
        from rlbench_kernels.launch import use_triton

        return use_triton(self.load("torch").device(self.facts.device))

    def attention(self) -> str:
        """What the trainer's attention runs as, in words."""
        from rlbench_kernels.packed_attention import describe_backend

        return describe_backend(self.load("torch").device(self.facts.device))

    def has_compiler(self) -> bool:
        """Triton builds its launchers with it."""
        return bool(os.environ.get("CC")) or any(shutil.which(name) for name in ("cc", "gcc", "clang"))

    def sandbox(self) -> str:
        """Name of the backend that contains its probes.

        Raises:
            ValueError: none does.
        """
        from rlbench_rewards.sandbox.choice import choose_backend

        return choose_backend()

    def hub_problem(self) -> str | None:
        from rlbench.data.hub import hub_problem

        return hub_problem()

    def find_model(self) -> Path | None:
        """The folder of the run's model; None: it must be downloaded, or made of a packaged GGUF file.

        Raises:
            ValueError: it can be had from nowhere.
        """
        from rlbench.models.source import check_model_path, find_local_model

        check_model_path(self.config.model.path or "")
        return find_local_model(self.config.model)

    def wandb_mode(self) -> str:
        from rlbench.tracking.wandb_tracker import choose_mode, find_api_key

        return choose_mode("auto", find_api_key() is not None, lambda _: None)

    def free_gib(self, folder: Path) -> float:
        return shutil.disk_usage(folder).free / GIB

    def can_write(self, folder: Path) -> bool:
        return os.access(folder, os.W_OK)

    def cores(self) -> tuple[int, int]:
        """That this process may use, and that the machine has."""
        from rlbench.models.device import usable_cores

        return usable_cores(), os.cpu_count() or 1
