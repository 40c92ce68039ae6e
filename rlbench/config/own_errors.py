"""Tells a mistake of the user, which our code names in a sentence, from a library's error."""

from __future__ import annotations

import os
import traceback

_OURS = ("rlbench", "rlbench_rewards", "rlbench_kernels")


def is_raised_by_us(error: BaseException) -> bool:
    """True if our own code raised it. With RLBENCH_TRACEBACK set, never."""
    if os.environ.get("RLBENCH_TRACEBACK"):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return any(f"{os.sep}{package}{os.sep}" in last for package in _OURS)
