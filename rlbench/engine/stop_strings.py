"""Texts that end a completion, looked for in its decoded text after each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_INVALID_PREFIX = "Invalid prefix"  # how the stream says that bytes so far decode to nothing stable


class StopStrings:
    """The text of each completion of a wave, without special tokens, as it grows.

    The same incremental decoding as vLLM's (the tokenizers library's stream, begun with the prompt), so that both
    engines end a completion at the same token.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Sequence[int]], stop: Sequence[str]) -> None:
        """
        Args:
            tokenizer: a fast tokenizer of transformers, or None.
            prompts: one a sample.
            stop: texts of at least one character.

        Raises:
            ValueError: there is no tokenizer, or it is not a fast one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"sampling.stop is {list(stop)}, which needs the model's fast tokenizer; got {type(tokenizer).__name__}"
            )
        self._tokenizer = backend
        self._stop = tuple(stop)
        self._longest = max(map(len, stop))
        self._streams = [DecodeStream(ids=list(prompt), skip_special_tokens=True) for prompt in prompts]
        self._tails = [""] * len(prompts)  # the last characters that a stop string could begin in

    def is_completed_by(self, sample: int, token: int) -> bool:
        """Whether `token`, appended to the completion, makes its text contain a stop string."""
        text = self._tails[sample] + self._decode(sample, token)
        self._tails[sample] = text[-(self._longest - 1) :] if self._longest > 1 else ""
        return any(stop in text for stop in self._stop)

    def _decode(self, sample: int, token: int) -> str:
        try:
            return self._streams[sample].step(self._tokenizer, token) or ""
        except Exception as error:  # the library raises a bare Exception
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            self._streams[sample] = DecodeStream(skip_special_tokens=True)
            return self._streams[sample].step(self._tokenizer, token) or ""
