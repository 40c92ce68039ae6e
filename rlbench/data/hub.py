"""Whether the Hugging Face hub can be reached, found out once and quickly."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit

_TIMEOUT_S = 2.0


@functools.cache
def hub_problem() -> str | None:
    """None if the hub answers, else why not. Without a hub, libraries are told to stay offline instead of retrying.

    Honours HF_HUB_OFFLINE and HF_ENDPOINT. Takes at most 2 s.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    host = urlsplit(proxy) if proxy else endpoint
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((host.hostname or "", port), timeout=_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return f"{host.hostname}: {getattr(error, 'strerror', None) or error}"
    return None
