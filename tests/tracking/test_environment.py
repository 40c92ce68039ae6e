"""What a run says about the machine it ran on."""

import json
import platform

from rlbench.tracking.environment import environment


def test_the_environment_names_what_is_installed_and_nothing_else():
    found = environment()

    assert found["python"] == platform.python_version() and found["packages"]["pyarrow"]
    assert all(found["packages"].values()) and json.loads(json.dumps(found)) == found
