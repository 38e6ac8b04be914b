"""The ways to send a payload to the sidecar."""

from __future__ import annotations

import os
from typing import Any, Literal, Protocol

from .. import _wire as wire
from .call import UpdateCall
from .payload import Payload
from .payload_file import PayloadFile
from .shared_memory import Segment, SharedMemoryFile

Transport = Literal["cuda_ipc", "nccl", "shared_memory", "inline", "file"]
Mode = Literal["staged", "in_place"]

_CHUNK_BYTES = 1 << 20
_SMALLEST_WINDOW = 64 << 20  # from here on another message costs nothing noticeable
_LARGEST_WINDOW = 1 << 30


class Sender(Protocol):
    """One of them, for one push."""

    transport: Transport
    reason: str
    """Why it is this one; for ``PushResult.reason``."""

    def send(self, call: UpdateCall, payload: Payload, mode: Mode) -> int:
        """Copies the payload out of the trainer and tells the sidecar where it is; returns when all is written and sent.

        Args:
            call: The update, whose manifest has been accepted.
            payload: Its bytes.
            mode: In place, the sidecar runs no step from the first message on.

        Returns:
            The end of what was sent: the sidecar reports that byte when it has read all.
        """


class InlineSender:
    """In the stream itself."""

    transport: Transport = "inline"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def send(self, call: UpdateCall, payload: Payload, mode: Mode) -> int:
        scratch = memoryview(bytearray(payload.piece_bytes))
        sent = 0

        def send(piece: memoryview | bytes) -> None:
            nonlocal sent
            for at in range(0, len(piece), _CHUNK_BYTES):
                chunk = bytes(piece[at : at + _CHUNK_BYTES])
                call.send(chunk=wire.Chunk(offset=sent, data=chunk))
                sent += len(chunk)

        def done(start: int, piece: memoryview) -> None:
            send(bytes(start - sent))  # the gap before it
            send(piece)

        payload.copy_to(lambda start, size: scratch[:size], done)
        send(bytes(payload.bytes - sent))  # where the last tensors have no elements
        return payload.bytes


class FileSender:
    """Through a safetensors file in a folder that the sidecar can read."""

    transport: Transport = "file"

    def __init__(self, header: bytes, payload_bytes: int, folder: str | os.PathLike[str], reason: str) -> None:
        """Raises PayloadFileError where the file cannot be made."""
        self.reason = reason
        self._header = header
        self._file = PayloadFile(len(header) + payload_bytes, folder)

    def send(self, call: UpdateCall, payload: Payload, mode: Mode) -> int:
        scratch = memoryview(bytearray(payload.piece_bytes))
        # Closed before the sidecar is told: that is when a network file system shows it to others.
        with open(self._file.path, "r+b") as file:

            def done(start: int, piece: memoryview) -> None:
                file.write(piece)
                call.raise_if_ended()

            file.write(self._header)
            payload.copy_to(lambda start, size: scratch[:size], done)
        call.send(file=wire.CheckpointFile(path=str(self._file.path)))
        return payload.bytes

    def close(self) -> None:
        """Removes the file."""
        self._file.close()


class SharedMemorySender:
    """Through shared memory, window by window, so that the sidecar reads one while the next is written. Memory smaller than the payload is
    used as a ring: a window overwrites one that the sidecar has read."""

    transport: Transport = "shared_memory"

    def __init__(self, memory: Segment | SharedMemoryFile, capacity: int, reason: str) -> None:
        """
        Args:
            capacity: Bytes of the memory to use.
        """
        self.reason = reason
        self._memory = memory
        self._capacity = capacity

    def send(self, call: UpdateCall, payload: Payload, mode: Mode) -> int:
        windows = _Windows(call, self._memory, self._capacity, payload.bytes, mode)
        scratch: memoryview | None = None
        split = False

        def place(start: int, size: int) -> memoryview:
            nonlocal scratch, split
            room = windows.room(start)
            split = size > len(room)
            if not split:
                return room[:size]
            scratch = scratch or memoryview(bytearray(payload.piece_bytes))
            return scratch[:size]

        def done(start: int, piece: memoryview) -> None:
            call.raise_if_ended()
            while split and len(piece) > 0:
                room = windows.room(start)
                part = piece[: len(room)]
                room[: len(part)] = part
                start += len(part)
                piece = piece[len(part) :]

        payload.copy_to(place, done)
        windows.finish()
        return payload.bytes


class _Windows:
    """The parts of a payload, one after another, and their places in the memory."""

    def __init__(self, call: UpdateCall, memory: Segment | SharedMemoryFile, capacity: int, payload_bytes: int, mode: Mode) -> None:
        self._call = call
        self._memory = memory
        self._payload_bytes = payload_bytes
        self._ring = capacity < payload_bytes
        self._bytes = window_bytes(payload_bytes, capacity)
        if mode == "in_place" and not self._ring:  # while no step runs, the sidecar should only have to read
            self._bytes = max(1, payload_bytes)
        self._places = max(1, capacity // self._bytes)
        self._current = 0

    def room(self, at: int) -> memoryview:
        """The memory from a payload byte to the end of its window, after sending the windows before and waiting for the place."""
        self._send_before(at // self._bytes)
        end = min((self._current + 1) * self._bytes, self._payload_bytes)
        place = self._place() - self._current * self._bytes
        return self._memory.view[place + at : place + end]

    def finish(self) -> None:
        """Sends what is left."""
        self._send_before(-(-self._payload_bytes // self._bytes))

    def _send_before(self, window: int) -> None:
        while self._current < window:
            start = self._current * self._bytes
            size = min(self._bytes, self._payload_bytes - start)
            self._call.send(shared_memory=wire.SharedMemory(
                path=str(self._memory.path), offset=self._place(), payload_offset=start, bytes=size))
            self._current += 1
            if self._ring and self._current >= self._places and self._current * self._bytes < self._payload_bytes:
                self._call.received((self._current - self._places + 1) * self._bytes)

    def _place(self) -> int:
        return (self._current % self._places if self._ring else self._current) * self._bytes


def window_bytes(payload: int, capacity: int) -> int:
    """An eighth of the payload, within limits; in a ring at most half of the memory."""
    window = max(_SMALLEST_WINDOW, min(payload // 8, _LARGEST_WINDOW))
    return min(window, max(1, capacity // 2)) if capacity < payload else window
