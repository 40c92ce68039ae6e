"""Loading without the progress bars of transformers, which would tear through the run's own display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

from tqdm import tqdm
from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws none inside; afterwards it is as before. Not for downloads, whose bars users want."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    visible = tqdm.__init__
    # The GGUF reader does not ask transformers' own switch.
    setattr(tqdm, "__init__", partialmethod(visible, disable=True))  # noqa: B010
    try:
        yield
    finally:
        setattr(tqdm, "__init__", visible)  # noqa: B010
        if was_enabled:
            logging.enable_progress_bar()
