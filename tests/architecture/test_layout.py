"""Rules of the layout that no linter knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlbench.config.compose import config_folder, group_choices, register_schema, to_run_config

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
MAX_LINES = 500


@pytest.mark.parametrize("folder", ["kernels", "rewards"])
def test_outer_folders_are_no_packages(folder):
    # A top-level package `kernels` would shadow the one of that name that transformers looks for.
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_file_is_too_long():
    packages = [ROOT / "rlbench", ROOT / "kernels", ROOT / "rewards", ROOT / "scripts", ROOT / "tests"]
    files = [file for package in packages for file in package.rglob("*.py")]
    too_long = {str(f): n for f in files if (n := len(f.read_text().splitlines())) > MAX_LINES}

    assert len(files) > 50 and not too_long


@pytest.mark.parametrize("module", ["rlbench", "rlbench.config.compose", "rlbench.records", "rlbench_rewards"])
def test_light_modules_import_no_torch(module):
    code = (
        f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'sympy', 'datasets')))"
    )

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment()).returncode == 0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "rewards")))}


def compose(*overrides: str):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


GROUPS = ["hardware", "model", "data", "rewards", "algorithm", "engine", "optim", "tracking"]


NEEDS = {("engine", "recorded"): ["engine.recorded_from=RUN"]}  # what a choice means nothing without


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g in GROUPS for c in group_choices(g)])
def test_every_group_choice_composes_and_converts(group, choice):
    needed = NEEDS.get((group, choice), [])
    to_run_config(compose(f"{group}={choice}", *needed))
    if needed:
        with pytest.raises(ValueError, match=f"{group}.kind is {choice} and .* is None; expected both"):
            to_run_config(compose(f"{group}={choice}"))


@pytest.mark.parametrize("choice", group_choices("preference"))
def test_every_preference_composes_and_converts(choice):
    to_run_config(compose(f"preference={choice}", "stage=preference", "algorithm=none", "rewards=none"))


@pytest.mark.parametrize("name", group_choices("exp"))
def test_every_experiment_composes_and_converts(name):
    assert to_run_config(compose(f"+exp={name}")).name == name


@pytest.mark.parametrize("algorithm", [name for name in group_choices("algorithm") if name != "none"])
def test_every_algorithm_has_an_experiment(algorithm):
    texts = [(CONF / "exp" / f"{name}.yaml").read_text() for name in group_choices("exp")]
    default = "algorithm: grpo\n"  # of config.yaml
    assert default in (CONF / "config.yaml").read_text()

    assert any(f"/algorithm: {algorithm}\n" in text for text in texts) or algorithm in default.split()


@pytest.mark.parametrize("file", sorted(config_folder().rglob("*.yaml")), ids=lambda f: f.stem)
def test_yaml_files_use_no_target(file):
    assert "_target_" not in file.read_text()
    yaml.safe_load(file.read_text())
