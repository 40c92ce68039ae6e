"""The settings of a recorded run: what is said of a file that is damaged or of another version."""

import pytest

from rlbench.config.recorded import recorded_config

BROKEN = {
    "no YAML": (b"a: [", "cannot be read"),
    "no text": (b"\xff\xfe", "cannot be read"),
    "another version": (b"name: x\noptim:\n  nesterov: 3\n", r"does not fit this version of rlbench \(.*nesterov"),
    "another type": (b"seed: much\n", r"does not fit this version of rlbench \(.*much"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_settings_that_cannot_be_read_are_one_sentence_with_the_file(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / "config.yaml").write_bytes(content)

    with pytest.raises(ValueError, match=f"config.yaml {message}") as raised:
        recorded_config(tmp_path)

    assert "\n" not in str(raised.value)
