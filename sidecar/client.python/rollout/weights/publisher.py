"""State that is kept from push to push."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any, Literal

import grpc

from .. import _wire as wire
from ..errors import from_rpc
from .layout import PayloadLayout
from .push import PushResult, WeightPush
from .shared_memory import Segment, SharedMemoryFile, remove_leftovers
from .tensors import Weights, sources

_STATUS_TIMEOUT = 30.0


class Publisher:
    """Keeps the layout of the tensors, the shared memory and the version pushed last. See ``Rollout.push_weights``."""

    resolve_within = 10.0
    """Seconds to keep asking, after the connection broke during a commit, whether the sidecar committed."""

    def __init__(self, calls: wire.Calls) -> None:
        self._calls = calls
        self._one_at_a_time = threading.Lock()
        self._layout: PayloadLayout | None = None
        self._segment: Segment | None = None
        self._file: SharedMemoryFile | None = None  # where the sidecar's own memory cannot be reached
        self._served: int | None = None
        remove_leftovers()

    def push(
        self,
        weights: Weights,
        *,
        version: int | None,
        base_version: int | None,
        policy: str,
        mode: str,
        partial: bool,
        transport: Literal["shared_memory", "inline"],
        dtype: Literal["bfloat16"] | None,
        owner: str | None,
        timeout: float,
    ) -> PushResult:
        if transport not in ("shared_memory", "inline"):
            raise ValueError(f"transport={transport!r}: expected 'shared_memory' or 'inline'")
        if timeout <= 0:
            raise ValueError(f"timeout={timeout!r}: expected seconds, more than 0")
        begin = wire.BeginUpdate(
            policy=wire.UPDATE_POLICY.number(policy, "policy"),
            mode=0 if mode == "auto" else wire.UPDATE_MODE.number(mode, "mode"),
            partial=partial,
            owner=f"{socket.gethostname()}/{os.getpid()}" if owner is None else owner,
        )
        tensors = sources(weights, dtype)
        with self._one_at_a_time:
            deadline = time.monotonic() + timeout
            if self._layout is None or not self._layout.fits(tensors):
                self._layout = PayloadLayout(tensors)
            if base_version is None:
                base_version = self._served if self._served is not None else self._ask(min(timeout, _STATUS_TIMEOUT))
            begin.base_version = base_version
            begin.new_version = base_version + 1 if version is None else version
            # Until this push has succeeded it is not known what is served.
            self._served = None
            result = WeightPush(
                self._calls, self._layout, tensors, begin,
                memory=self._shared_memory if transport == "shared_memory" else None,
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

    def _shared_memory(self, segment: Any, capacity: int) -> SharedMemoryFile | Segment:
        if segment.bytes >= capacity:
            if self._segment is None or self._segment.name != segment.name:
                self._segment = Segment.try_open(segment.name, segment.path, segment.bytes)
            if self._segment is not None:
                return self._segment
        if self._file is None or self._file.capacity < capacity or not self._file.exists:
            # Free the old one first: there may not be room for both.
            if self._file is not None:
                self._file.close()
            self._file = None
            self._file = SharedMemoryFile(capacity)
        return self._file
