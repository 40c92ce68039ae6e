"""Frames over a stream socket: uint32 length, then one encoded value. `_socket`, because `socket` loads slowly."""

from __future__ import annotations

import _socket
import array
import struct

from rlbench_rewards.sandbox.codec import MAX_FRAME_BYTES, CodecError

MAX_DESCRIPTORS = 8


class ChannelClosed(Exception):
    """The other side is gone."""


def send_frame(connection: _socket.socket, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
    """Send one frame; the descriptors travel with its first byte."""
    frame = struct.pack("<I", len(data)) + data
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        num_sent = connection.sendmsg([frame], rights)
        if num_sent < len(frame):
            connection.sendall(frame[num_sent:])
    except (BrokenPipeError, ConnectionResetError):
        raise ChannelClosed from None


def send_frames(connection: _socket.socket, frames: list[bytes]) -> None:
    """Send several frames at once: the receiver is woken once."""
    try:
        connection.sendall(b"".join(struct.pack("<I", len(data)) + data for data in frames))
    except (BrokenPipeError, ConnectionResetError):
        raise ChannelClosed from None


def receive_frame(connection: _socket.socket) -> bytes:
    """The bytes of one frame.

    Raises:
        ChannelClosed: the other side closed it, also in the middle of a frame.
        CodecError: a frame longer than MAX_FRAME_BYTES.
    """
    return _body(connection, _receive_exactly(connection, 4))


def receive_frame_with_descriptors(connection: _socket.socket) -> tuple[bytes, list[int]]:
    """One frame and the descriptors that came with it."""
    descriptors = array.array("i")
    space = _socket.CMSG_SPACE(MAX_DESCRIPTORS * descriptors.itemsize)
    header, rights, _, _ = connection.recvmsg(4, space, _socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in rights:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if len(header) < 4:
        header += _receive_exactly(connection, 4 - len(header))
    return _body(connection, header), list(descriptors)


def _body(connection: _socket.socket, header: bytes) -> bytes:
    (size,) = struct.unpack("<I", header)
    if size > MAX_FRAME_BYTES:
        raise CodecError(f"a frame of {size} bytes, at most {MAX_FRAME_BYTES} may come")
    return _receive_exactly(connection, size)


def _receive_exactly(connection: _socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            part = connection.recv(min(size - len(data), 2**18))
        except ConnectionResetError:
            part = b""
        if not part:
            raise ChannelClosed
        data += part
    return bytes(data)
