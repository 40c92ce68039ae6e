"""The settings of a recorded run: what is said of a file that is damaged or of another version."""

import re

import pytest
import yaml

from rlbench.config.recorded import recorded_config

BROKEN = {
    "no YAML": (b"a: [", "cannot be read"),
    "no text": (b"\xff\xfe", "cannot be read"),
    "another version": (
        b"name: x\noptim:\n  nesterov: 3\n",
        r"has optim.nesterov=3, which this version of rlbench does not know \(nearest valid keys: optim\.",
    ),
    "nothing": (b"", "holds no settings; expected those of a run"),
    "a list": (b"- a\n", "holds no settings; expected those of a run"),
    "another type": (b"seed: much\n", r"does not fit this version of rlbench \(.*much"),
    "what no version took": (b"lora:\n  rank: 0\n", r"lora.rank is 0, expected at least 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_settings_that_cannot_be_read_are_one_sentence_with_the_file(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / "config.yaml").write_bytes(content)

    with pytest.raises(ValueError, match=f"config.yaml:? {message}") as raised:
        recorded_config(tmp_path)

    assert "\n" not in str(raised.value)


def test_what_is_no_run_is_named_with_the_runs_below_it(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in "ba":
        (tmp_path / "sweep" / name).mkdir(parents=True)
        (tmp_path / "sweep" / name / "config.yaml").write_text("seed: 1\n")

    below = f"{tmp_path / 'sweep' / 'a'}, {tmp_path / 'sweep' / 'b'}"
    for name, sentence in {
        "gone": f"there is no folder {tmp_path / 'gone'}; expected",
        "file": f"{tmp_path / 'file'} is a file; expected",
        "empty": f"{tmp_path / 'empty'} holds no config.yaml; expected",
        "sweep": f"{tmp_path / 'sweep'} holds runs and is none; expected one of: {below}",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            recorded_config(tmp_path / name)


def test_another_engine_leaves_open_what_was_derived_for_vllm_but_not_what_the_call_sets(tmp_path):
    engine = {"kind": "vllm", "kv_cache_gib": 4.0, "dense_copies": "merged", "max_num_seqs": 64}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"engine": engine}))

    found = recorded_config(tmp_path, ["engine.kind=hf", "engine.dense_copies=base"]).engine
    assert (found.kv_cache_gib, found.dense_copies, found.max_num_seqs) == (None, "base", 64)
    same = recorded_config(tmp_path, ["engine.kind=vllm"]).engine
    assert (same.kv_cache_gib, same.dense_copies) == (4.0, "merged")
