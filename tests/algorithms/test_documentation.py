"""Every choice of an algorithm has a docstring with its source, a row with its keys in the README, and true sources."""

import inspect
import re
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass

import pytest

from rlbench.algorithms import ADVANTAGES, KL_ESTIMATORS, NORMALIZATIONS, POLICY_LOSSES
from rlbench.algorithms.preference_losses import DIVERGENCES, PREFERENCE_LOSSES, UNPAIRED_LOSSES
from rlbench.config.algorithm import ADVANTAGES as ADVANTAGE_SPECS
from rlbench.config.algorithm import LOSSES, AlgorithmConfig
from rlbench.config.compose import group_choices
from rlbench.config.preference import PREFERENCE_LOSSES as PREFERENCE_SPECS
from rlbench.config.preference import PreferenceConfig
from tests.architecture.test_layout import environment
from tests.loops.conftest import ROOT

README = (ROOT / "rlbench" / "algorithms" / "README.md").read_text()
PAIR_AND_SINGLE = PREFERENCE_LOSSES | UNPAIRED_LOSSES
FUNCTIONS = {  # by the head of the table's first column
    "algorithm.loss=": POLICY_LOSSES,
    "algorithm.advantage=": ADVANTAGES,
    "kl": KL_ESTIMATORS,
    "preference.losses=[...]": PAIR_AND_SINGLE,
}
CASES = [(head, name) for head, table in FUNCTIONS.items() for name in table]
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")


def rows(head: str) -> dict[str, list[str]]:
    """Cells of the table whose first column is headed so, by every name in the first cell."""
    (table,) = (part for part in README.split("\n\n") if part.startswith(f"| `{head}`"))
    found = {}
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells)
    return found


def test_the_tables_list_just_what_there_is():
    for head, table in FUNCTIONS.items():
        assert list(rows(head)) == list(table) or set(rows(head)) == set(table), head
    assert set(rows("algorithm=")) == set(group_choices("algorithm")) - {"none"}


@pytest.mark.parametrize(("head", "name"), CASES)
def test_its_docstring_gives_a_formula_and_a_source(head, name):
    text = inspect.getdoc(FUNCTIONS[head][name]) or ""

    assert "Source: " in text
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https?://|\b(19|20)\d\d\b", text.split("Source: ")[1])
    assert len(text.split("Source: ")[0]) > 15


@pytest.mark.parametrize("head", ["algorithm.loss=", "algorithm.advantage=", "preference.losses=[...]"])
def test_the_sources_of_a_row_are_those_of_its_docstrings(head):
    for name, cells in rows(head).items():
        same_row = [other for other, row in rows(head).items() if row == cells]
        known = set(ARXIV.findall(" ".join(inspect.getdoc(FUNCTIONS[head][other]) or "" for other in same_row)))
        assert set(ARXIV.findall(cells[-1])) <= known, name


@pytest.mark.parametrize("name", LOSSES)
def test_the_row_of_a_loss_has_its_keys_and_defaults(name):
    found = re.findall(r"`(\w+)` (\S+?)(?:,|$)", rows("algorithm.loss=")[name][2])

    expected = {key: value for key, value in LOSSES[name].options.items()}
    assert {key: None if value == "off" else float(value) for key, value in found} == expected


@pytest.mark.parametrize("name", ADVANTAGE_SPECS)
def test_the_row_of_an_advantage_has_its_scales(name):
    scales = re.findall(r"`(\w+)`", rows("algorithm.advantage=")[name][2])

    assert set(scales) == set(ADVANTAGE_SPECS[name].scales)
    assert (scales[0] if scales else None) == ADVANTAGE_SPECS[name].default_scale


@pytest.mark.parametrize("name", PREFERENCE_SPECS)
def test_the_row_of_a_preference_loss_has_its_keys(name):
    cells = rows("preference.losses=[...]")[name]
    own = set(PREFERENCE_SPECS[name].options)

    assert set(re.findall(r"`(\w+)`", cells[2])) == own - {"beta"}
    assert ("not beta" in cells[2]) == ("beta" not in own)


def keys(config: object) -> list[str]:
    """Names of the fields, those of sections too."""
    own = [(f.name, getattr(config, f.name)) for f in fields(config)]  # type: ignore[arg-type]
    return [key for name, value in own for key in [name, *(keys(value) if is_dataclass(value) else [])]]


@pytest.mark.parametrize("key", dict.fromkeys(keys(AlgorithmConfig()) + keys(PreferenceConfig())))
def test_every_key_is_named(key):
    assert re.search(rf"\b{key}\b", README)


def test_every_file_of_preferences_and_every_normalization_and_divergence_is_named():
    names = [*NORMALIZATIONS, *DIVERGENCES, *(set(group_choices("preference")) - {"none"})]

    assert [name for name in names if not re.search(rf"\b{name}\b", README)] == []


def test_the_recipe_is_the_test_that_adds_a_loss_from_outside():
    recipe = README.split("### Add a loss")[1].split("###")[0]
    name = re.search(r"`(tests/\S+)::(\w+)`", recipe)
    assert name is not None

    source = (ROOT / name[1]).read_text().split(f"def {name[2]}(")[1]
    for line in re.findall(r"    (?:    )?(def .*|per_token = .*)", recipe):
        assert line in source, line


def test_the_recipe_is_a_file_that_runs(tmp_path):
    block = README.split("### Add a loss")[1].split("###")[0].split("\n\n    import ")[1]
    code = textwrap.dedent("    import " + block)
    (tmp_path / "my_loss.py").write_text(code)
    (command,) = re.findall(r"python my_loss\.py (.*)$", code, re.MULTILINE)
    words = [sys.executable, "my_loss.py", "explain", *command.split(), "algorithm.clip_ratio_max"]

    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "3.0" in done.stdout and "default of loss=scaled_reinforce" in done.stdout
