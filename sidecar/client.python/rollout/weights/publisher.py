"""State that is kept from push to push."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import Any, Literal

import grpc

from .. import _wire as wire
from ..address import on_this_machine
from ..errors import from_rpc
from . import safetensors
from .layout import ALIGNMENT, PayloadLayout
from .payload_file import free_bytes, remove_leftovers
from .push import PushResult, WeightPush
from .senders import FileSender, InlineSender, Sender, SharedMemorySender, Transport
from .shared_memory import FOLDER, Segment, SharedMemoryFile
from .tensors import Weights, sources

_STATUS_TIMEOUT = 30.0
_LEAST_RING = 4 << 20  # with less shared memory a ring is not worthwhile: the error then says what to do


class Publisher:
    """Keeps the layout of the tensors, the shared memory and the version pushed last. See ``Rollout.push_weights``."""

    resolve_within = 10.0
    """Seconds to keep asking, after the connection broke during a commit, whether the sidecar committed."""

    def __init__(self, calls: wire.Calls, address: str) -> None:
        self._calls = calls
        self._address = address
        self._near: bool | None = None  # whether the sidecar is on this machine, once that was asked
        self._one_at_a_time = threading.Lock()
        self._layout: PayloadLayout | None = None
        self._segment: Segment | None = None
        self._file: SharedMemoryFile | None = None  # where the sidecar's own memory cannot be reached
        self._file_for = 0  # bytes it was made for; the file may be smaller
        self._served: int | None = None
        remove_leftovers(FOLDER)

    def push(
        self,
        weights: Weights,
        *,
        version: int | None,
        base_version: int | None,
        policy: str,
        mode: str,
        partial: bool,
        transport: Literal["auto"] | Transport,
        folder: str | os.PathLike[str] | None,
        max_shared_memory_bytes: int | None,
        dtype: Literal["bfloat16"] | None,
        owner: str | None,
        timeout: float,
    ) -> PushResult:
        _check_transport(transport, folder, max_shared_memory_bytes)
        if timeout <= 0:
            raise ValueError(f"timeout={timeout!r}: expected seconds, more than 0")
        begin = wire.BeginUpdate(
            policy=wire.UPDATE_POLICY.number(policy, "policy"),
            mode=0 if mode == "auto" else wire.UPDATE_MODE.number(mode, "mode"),
            partial=partial,
            owner=f"{socket.gethostname()}/{os.getpid()}" if owner is None else owner,
        )
        tensors = sources(weights, dtype)
        with self._one_at_a_time, contextlib.ExitStack() as stack:
            deadline = time.monotonic() + timeout
            alignment = 1 if transport == "file" else ALIGNMENT  # a safetensors file has no room between tensors
            if self._layout is None or not self._layout.fits(tensors, alignment):
                self._layout = PayloadLayout(tensors, alignment)
            layout = self._layout
            file = None
            if folder is not None:
                header = safetensors.header(layout, tensors)
                file = FileSender(header, layout.payload_bytes, folder, "transport='file' was asked for")
                stack.callback(file.close)
            if base_version is None:
                base_version = self._served if self._served is not None else self._ask(min(timeout, _STATUS_TIMEOUT))
            begin.base_version = base_version
            begin.new_version = base_version + 1 if version is None else version
            most = max(1, layout.payload_bytes if max_shared_memory_bytes is None else min(layout.payload_bytes, max_shared_memory_bytes))
            begin.segment_bytes = most if transport == "shared_memory" or transport == "auto" and self._is_near() else 0
            # Until this push has succeeded it is not known what is served.
            self._served = None
            result = WeightPush(
                self._calls, layout, tensors, begin,
                sender=lambda ready: file or self._sender(ready, transport, most, layout.payload_bytes),
                timeout=max(0.001, deadline - time.monotonic()),
                resolve_within=self.resolve_within,
            ).run()
            self._served = result.version
            return result

    def close(self) -> None:
        """Waits for a push in progress, then frees the shared memory."""
        with self._one_at_a_time:
            for memory in (self._segment, self._file):
                if memory is not None:
                    memory.close()
            self._segment = self._file = None

    def _ask(self, timeout: float) -> int:
        try:
            return int(self._calls.status(wire.StatusRequest(), timeout=timeout).version)
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    def _is_near(self) -> bool:
        if self._near is None:
            self._near = on_this_machine(self._address)
        return self._near

    def _sender(self, ready: Any, transport: Literal["auto"] | Transport, most: int, payload_bytes: int) -> Sender:
        """
        Args:
            most: Bytes of shared memory to use.
        """
        if transport == "inline":
            return InlineSender("transport='inline' was asked for")
        asked = "transport='shared_memory' was asked for, and " if transport == "shared_memory" else ""
        segment = self._lent(ready.segment) if ready.HasField("segment") else None
        if segment is not None:
            return _through(segment, min(len(segment.view), most), payload_bytes, f"{asked}the sidecar's memory can be opened here")
        if transport == "auto" and not self._is_near():
            return InlineSender(f"the sidecar at {self._address} is on another machine")
        why = "the sidecar's memory cannot be opened here: it is in another container or another user's" \
            if ready.HasField("segment") else "the sidecar has no memory to lend"
        if transport == "auto":
            return InlineSender(why)
        file = self._own_file(most)
        return _through(file, min(file.capacity, most), payload_bytes, f"{asked}{why}: through {file.path}")

    def _lent(self, segment: Any) -> Segment | None:
        if self._segment is None or self._segment.name != segment.name:
            self._segment = Segment.try_open(segment.name, segment.path, segment.bytes)
        return self._segment

    def _own_file(self, wanted: int) -> SharedMemoryFile:
        if self._file is None or self._file_for < wanted or not self._file.exists:
            # Free the old one first: there may not be room for both.
            if self._file is not None:
                self._file.close()
            self._file = None
            free = free_bytes(FOLDER)
            scarce = free is not None and _LEAST_RING <= free < wanted
            self._file = SharedMemoryFile(free // 4 * 3 if scarce else wanted)
            self._file_for = wanted
        return self._file


def _through(memory: Segment | SharedMemoryFile, capacity: int, payload_bytes: int, reason: str) -> Sender:
    if capacity < payload_bytes:
        reason += f"; {capacity:,} bytes of it for a payload of {payload_bytes:,}, used as a ring"
    return SharedMemorySender(memory, capacity, reason)


def _check_transport(
    transport: Literal["auto"] | Transport, folder: str | os.PathLike[str] | None, max_shared_memory_bytes: int | None,
) -> None:
    known = ("auto", "shared_memory", "inline", "file")
    if transport not in known:
        raise ValueError(f"transport={transport!r}: expected one of {', '.join(map(repr, known))}")
    if (transport == "file") != (folder is not None):
        raise ValueError(f"folder={folder!r}: transport='file' needs one, and no other transport")
    if max_shared_memory_bytes is not None and max_shared_memory_bytes < 1:
        raise ValueError(f"max_shared_memory_bytes={max_shared_memory_bytes!r}: expected a number of bytes, more than 0")
