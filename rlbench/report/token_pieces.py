"""Where each sampled token lies in its completion's text, from the model's own tokenizer file. No network, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SPACE = "\u2581"  # how sentence-piece vocabularies write a space


class Vocabulary:
    """Bytes by token id; special tokens, which the text leaves out, are empty.

    Args:
        pieces: bytes by token id.
    """

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces

    def lengths(self, token_ids: Sequence[int], text: str) -> list[int] | None:
        """UTF-16 units of `text` that each token stands for; None if the tokens do not spell the text.

        A character that several tokens share belongs to the first of them.
        """
        pieces = [self._pieces.get(token, b"") for token in token_ids]
        whole = b"".join(pieces)
        if whole.startswith(b" ") and not text.startswith(" "):  # some decoders drop the first space
            index = next(i for i, piece in enumerate(pieces) if piece)
            pieces[index], whole = pieces[index][1:], whole[1:]
        if whole != text.encode("utf-8", "surrogatepass"):
            return None
        return [sum(_utf16_units(byte) for byte in piece) for piece in pieces]


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary in `tokenizer.json`; None if there is none of a kind that is known here."""
    try:
        saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = saved["model"]["vocab"]
        added = saved.get("added_tokens") or []
        pieces = _byte_pieces(vocabulary) if _is_byte_level(saved) else _sentence_pieces(vocabulary)
        pieces |= {t["id"]: b"" if t.get("special") else t["content"].encode() for t in added}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Vocabulary(pieces)


def _utf16_units(byte: int) -> int:
    """Of the character that begins with this byte of UTF-8; 0 for a byte that continues one."""
    return 0 if 0x80 <= byte < 0xC0 else 2 if byte >= 0xF0 else 1


def _is_byte_level(saved: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([saved.get("decoder"), saved.get("pre_tokenizer")])


def _byte_pieces(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    alphabet = _byte_alphabet()
    return {
        index: bytes(alphabet[character] for character in token)
        for token, index in vocabulary.items()
        if all(character in alphabet for character in token)
    }


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write printable bytes as they are and the other 68 as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _sentence_pieces(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    return {index: _sentence_piece(token) for token, index in vocabulary.items()}


def _sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()
