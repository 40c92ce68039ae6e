"""What the Markdown files tell a user to type can be typed: settings compose, commands, options and files exist."""

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlbench.__main__ import COMMANDS
from rlbench.config.compose import group_names, resolve_model_shorthand, schema_keys, to_run_config
from rlbench.config.recorded import recorded_config
from rlbench.config.schema import RunConfig
from tests.architecture.test_layout import ROOT, compose

OF_PACKAGES = ["algorithms", "commands", "training"]
FILES = ["README.md", "CONTRIBUTING.md", "kernels/README.md", "rewards/README.md", "scripts/README.md"]
PAGES = [ROOT / file for file in FILES + [f"rlbench/{name}/README.md" for name in OF_PACKAGES]]
BASES = {
    "sft": "sft_gsm8k",
    "preference": "dpo_gsm8k",
    "reward_model": "reward_model_gsm8k",
    "chain": "chain_gsm8k",
    "lora.dropout": "sft_gsm8k",
}
RECORDED = ("eval", "replay", "rescore", "export", "chat", "serve")  # their settings change a run's
SETTING = re.compile(r"[+~]?[a-z_]+(?:/[a-z_]+)?(?:\.\w+)*=[^=].*|~[a-z_.]+")
OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]*")
OPEN = ("rewards.components.", "data.task_params.", "watchdog.phase_limits_s.")  # mappings whose keys are the user's
JUDGE = "rewards.components.judge.kwargs."
NEEDED = [  # what a setting means nothing without
    ("engine=recorded", "engine.recorded_from=RUN"),
    ("+rewards/add=judge", f"{JUDGE}base_url=http://127.0.0.1:8000/v1"),
    ("+rewards/add=judge", f"{JUDGE}model=NAME"),
]
SECTIONS = {key for key in schema_keys() if "." not in key}


def code(page: Path) -> list[str]:
    """Lines of code blocks without their comments; one that ends in a backslash goes on in the next."""
    joined = re.sub(r" *\\\n +", " ", page.read_text())
    return [re.split(r"\s+#(?:\s|$)", line.strip())[0] for line in joined.splitlines() if line.startswith("    ")]


def spans(page: Path) -> list[str]:
    """What the prose sets in code, over line ends too."""
    prose = "\n".join(line for line in page.read_text().splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def typed(start: str) -> list[str]:
    """Everything on the pages that begins so, without what it begins with."""
    return list(
        dict.fromkeys(
            text.removeprefix(start).strip()
            for page in PAGES
            for text in [*code(page), *spans(page)]
            if text.startswith(start)
        )
    )


def given_settings(words: list[str]) -> list[str]:
    """Settings among the words; of several values of a sweep the first."""
    given = [word for word in words if SETTING.fullmatch(word) and word.lstrip("+~").split("/")[0] != "hydra"]
    return [re.sub(r"=([^,\[{(]+),.*", r"=\1", word) for word in given] if "-m" in words else given


def composed(settings: list[str]) -> RunConfig:
    return to_run_config(compose(*resolve_model_shorthand(settings)[0]))


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory) -> Path:
    """A folder with the settings of a run, which commands on runs change."""
    folder = tmp_path_factory.mktemp("run")
    OmegaConf.save(compose("+exp=grpo_gsm8k"), folder / "config.yaml")
    return folder


def is_named(option: str, source: str) -> bool:
    return option == "--cfg" or f'"{option}"' in source or f'"{option.removeprefix("--")}"' in source


COMMAND_LINES = typed("python -m rlbench ")


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if given_settings(shlex.split(line))])
def test_the_settings_of_a_command_compose(line, recorded_run):
    words = shlex.split(line.replace("+exp=...", "+exp=grpo_gsm8k"))
    settings = given_settings(words)
    if any(setting.startswith("+exp=") for setting in settings):
        composed(settings)
    else:
        assert words[0] in RECORDED
        recorded_config(recorded_run, settings)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_and_its_options_exist(line):
    words = shlex.split(line)
    command = words[0] if re.fullmatch(r"[a-z]+", words[0]) else "train"
    sources = [ROOT / "rlbench" / "__main__.py", *(ROOT / "rlbench" / "commands").glob(f"{command}*.py")]
    text = "\n".join(source.read_text() for source in sources)

    assert command in COMMANDS
    assert [option for option in OPTION.findall(line) if not is_named(option, text)] == []


def test_every_option_of_the_prose_exists():
    source = "\n".join(file.read_text() for file in (ROOT / "rlbench" / "commands").glob("*.py"))
    texts = [span for page in PAGES for span in spans(page) if not span.startswith("pip ")]
    options = {option for text in texts for option in OPTION.findall(text)}
    of_scripts = {option for line in SCRIPTS for option in OPTION.findall(line)}

    assert len(options) >= 10
    assert {option for option in options - of_scripts if not is_named(option, source)} == set()


def lines_of_settings() -> list[str]:
    """Texts that begin with a setting, of all pages but that of the kernels, which has no settings."""
    texts = [text for page in PAGES if page.parent.name != "kernels" for text in [*code(page), *spans(page)]]
    known = SECTIONS | {"+exp", *group_names()}
    return list(
        dict.fromkeys(
            text
            for text in texts
            if SETTING.match(text.lstrip("'")) and re.split(r"[.=/]", text.lstrip("'+"))[0] in {*known, "exp"}
        )
    )


def filled(text: str) -> list[str]:
    """The settings of a text, with something in the places that a user fills in; names of their own are left out."""
    words = shlex.split(re.sub(r"=(\.\.\.|[A-Z]+)(?=\s|$)", "=x", text))
    return [word for word in given_settings(words) if not re.search(r"=\[?\.\.\.\]?$|TASK|\w=x$|\|", word)]


@pytest.mark.parametrize("text", [text for text in lines_of_settings() if "(" not in text and filled(text)])
def test_a_setting_of_the_prose_composes_with_an_experiment(text):
    settings = filled(text)
    settings += [extra for key, extra in NEEDED if key in settings]
    names = [part for s in settings for part in (s.split("=")[0], s.split(".")[0], s.removeprefix("stage="))]
    is_chain = {"algorithm", "preference"} <= set(names)
    base = "chain_gsm8k" if is_chain else next((BASES[name] for name in names if name in BASES), "grpo_gsm8k")
    has_experiment = any(setting.startswith("+exp=") for setting in settings)

    composed(settings if has_experiment else [f"+exp={base}", *settings])


def test_every_key_that_is_named_exists():
    keys = set(schema_keys())
    named = {
        word
        for page in PAGES
        for span in spans(page)
        for word in re.findall(r"(?<![\w./-])[a-z_]+(?:\.[a-z_0-9]+)+(?![\w/.(])", span)
        if word.split(".")[0] in SECTIONS - {"chain"}
    }

    assert len(named) > 60
    assert {name for name in named if name not in keys and not name.startswith(OPEN)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_heading_that_is_named_exists(page):
    text = page.read_text()
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, heading = target.partition("#")
        if "://" in place:
            continue
        file = (page.parent / place) if place else page
        if not file.exists() or (heading and heading not in headings(file)):
            missing.append(target)
    paths = re.findall(r"(?<![\w/.<+-])((?:scripts|tests|rlbench|kernels|rewards|conf)/[\w./-]*\w)", text)
    missing += [path for path in paths if not any((base / path).exists() for base in (ROOT, page.parent))]

    assert missing == []


def headings(page: Path) -> set[str]:
    """As GitHub writes them in an address."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


SCRIPTS = typed("python scripts/") + typed("python kernels/benchmarks/") + typed(".venv/bin/python scripts/")


@pytest.mark.parametrize("line", SCRIPTS)
def test_a_script_takes_what_is_written_behind_it(line):
    name, *words = shlex.split(line)
    (file,) = [
        folder / name for folder in (ROOT / "scripts", ROOT / "kernels" / "benchmarks") if (folder / name).exists()
    ]
    arguments = re.findall(r"add_argument\((.*)\)$", file.read_text(), re.MULTILINE)
    options = {a.split('"')[1]: "required=True" in a for a in arguments if a.startswith('"-')}
    places = [a for a in arguments if a.startswith('"') and not a.startswith('"-') and "nargs" not in a]
    own = [word for word in words if word.startswith("--")]

    assert [option for option in own if option not in options] == []
    assert [option for option, is_required in options.items() if is_required and option not in own] == []
    assert len([w for w in words if re.fullmatch("[A-Z_]+", w)]) >= len(places)
