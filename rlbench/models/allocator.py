"""How torch takes memory from a CUDA device in a process of rlbench."""

from __future__ import annotations

import os

# torch reads the first of them that is set, once, when it first allocates on a device.
_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, unless the user's environment says how it works.

    Microbatches are almost, not quite, of one size: segments that cannot grow are split and kept beside new ones, and a
    process came to hold far more memory than its tensors ever filled. vLLM's pool of keys and values, which cannot
    live in such segments, turns them off around itself where it sees this variable.

    To be called before the first allocation on a device.
    """
    if not allocator_setting():
        os.environ[_SETTINGS[0]] = "expandable_segments:True"


def allocator_setting() -> str:
    """How the environment says that torch's CUDA allocator works; "": as torch pleases."""
    return next((os.environ[name] for name in _SETTINGS if os.environ.get(name)), "")
