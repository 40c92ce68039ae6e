"""The exit status of a command that reads finished runs: what goes wrong is one sentence, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rlbench.tracking.errors import FILE_STATUS, TrackingError


def exit_status(action: Callable[[], None]) -> int:
    """0 if the action is done, 2 for a mistake of the user, 4 for a file that cannot be read or written."""
    try:
        action()
    except (ValueError, TrackingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FILE_STATUS if isinstance(error, TrackingError) else 2
    return 0
