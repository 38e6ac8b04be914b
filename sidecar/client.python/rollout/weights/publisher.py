"""State that is kept from push to push."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import grpc

from .. import _wire as wire
from ..address import on_this_machine
from ..errors import RolloutError, from_rpc
from . import cuda, digest, nccl, safetensors
from .broadcast import BroadcastSender, Group
from .cuda import Device
from .cuda_ipc import CudaIpcSender, DeviceMemory
from .from_device import device_of
from .layout import ALIGNMENT, PayloadLayout
from .payload_file import free_bytes, remove_leftovers
from .push import PushResult, WeightPush
from .senders import FileSender, InlineSender, Sender, SharedMemorySender, Transport
from .shards import ShardGroup
from .shared_memory import FOLDER, Segment, SharedMemoryFile
from .tensors import TensorSource, Weights, sources

_DEVICE = ("cuda_ipc", "nccl")  # transports of tensors that are on a GPU
_STATUS_TIMEOUT = 30.0
_FIRST_SEGMENT = 64 << 20
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
        self._device_memory: DeviceMemory | None = None
        self._group: Group | None = None
        self._sidecars_gpu: bytes | None = None  # its uuid, or empty where it has none, as it said last
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
        verify: bool | None,
        dtype: Literal["bfloat16"] | None,
        owner: str | None,
        timeout: float,
        shards: ShardGroup | None,
    ) -> PushResult:
        _check_transport(transport, folder, max_shared_memory_bytes)
        if verify and digest.xxhash is None:
            raise ValueError("verify=True needs the package xxhash")
        if timeout <= 0:
            raise ValueError(f"timeout={timeout!r}: expected seconds, more than 0")
        begin = wire.BeginUpdate(
            policy=wire.UPDATE_POLICY.number(policy, "policy"),
            mode=0 if mode == "auto" else wire.UPDATE_MODE.number(mode, "mode"),
            partial=partial,
            owner=f"{socket.gethostname()}/{os.getpid()}" if owner is None else owner,
        )
        tensors = sources(weights, dtype) if shards is None else shards.own(lambda: sources(weights, dtype, may_be_empty=True))
        with self._one_at_a_time, contextlib.ExitStack() as stack:
            deadline = time.monotonic() + timeout

            def prepared() -> WeightPush:
                alignment = 1 if transport == "file" else ALIGNMENT  # a safetensors file has no room between tensors
                if self._layout is None or not self._layout.fits(tensors, alignment):
                    self._layout = PayloadLayout(tensors, alignment)
                layout = self._layout
                choice = _Choice(transport, layout.payload_bytes, max_shared_memory_bytes)
                if folder is not None:
                    header = safetensors.header(layout, tensors)
                    choice.file = FileSender(header, layout.payload_bytes, folder, "transport='file' was asked for")
                    stack.callback(choice.file.close)
                if shards is None or shards.rank == 0:  # which tells the others
                    begin.base_version = self._base(timeout) if base_version is None else base_version
                    begin.new_version = begin.base_version + 1 if version is None else version
                if transport in _DEVICE or transport == "auto" and any(tensor.on_device is not None for tensor in tensors):
                    self._prepare_device(choice, tensors, layout, verify, stack, timeout)
                if transport in _DEVICE and choice.ipc is None:
                    raise ValueError(f"transport={transport!r}: {choice.why_host}")
                begin.segment_bytes = self._segment_bytes(choice)
                stack.push(self._leave_group_after_failure)
                return WeightPush(
                    self._calls, layout, tensors, begin,
                    sender=lambda ready: self._sender(ready, choice),
                    hashed=verify is not False,
                    timeout=max(0.001, deadline - time.monotonic()),
                    resolve_within=self.resolve_within,
                    shards=shards,
                )

            if shards is None:
                push = prepared()
            else:
                push, parts = _together(shards, prepared)
                push.parts = parts
            # Until this push has succeeded it is not known what is served.
            self._served = None
            result = push.run()
            self._served = result.version
            return result

    def release_memory(self, timeout: float | None) -> int:
        """See ``Rollout.release_memory``."""
        with self._one_at_a_time:
            closed = self._release(timeout)
            self._close_device()
            return closed

    def close(self) -> None:
        """Waits for a push in progress, then frees the shared memory."""
        with self._one_at_a_time:
            for memory in (self._segment, self._file):
                if memory is not None:
                    memory.close()
            self._close_device()
            self._segment = self._file = None

    def _close_device(self) -> None:
        """Frees what it keeps on the GPU."""
        if self._device_memory is not None:
            self._device_memory.close()
        if self._group is not None:
            self._group.close()
        self._device_memory = self._group = None

    def _leave_group_after_failure(self, kind: type[BaseException] | None, *_: object) -> None:
        """The sidecar has left it, or has received other bytes than the next push would send."""
        if kind is not None and self._group is not None:
            self._group.disconnect()

    def _base(self, timeout: float) -> int:
        return self._served if self._served is not None else self._ask(min(timeout, _STATUS_TIMEOUT))

    def _ask(self, timeout: float) -> int:
        try:
            return int(self._calls.status(wire.StatusRequest(), timeout=timeout).version)
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    def _release(self, timeout: float | None) -> int:
        try:
            return int(self._calls.release_memory(wire.ReleaseMemoryRequest(), timeout=timeout).closed)
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    def _prepare_device(
        self, choice: _Choice, tensors: Sequence[TensorSource], layout: PayloadLayout, verify: bool | None, stack: contextlib.ExitStack,
        timeout: float,
    ) -> None:
        device, choice.why_host = device_of(tensors)
        if device is None:
            return
        stack.enter_context(device.current())
        if self._device_memory is not None and self._device_memory.device is not device:
            self._close_device()
        self._device_memory = memory = self._device_memory or DeviceMemory(device)
        choice.ipc = CudaIpcSender(memory, tensors, layout.offsets, verify is True, f"all tensors are on the sidecar's {device.name}")
        self._group = self._group or Group(device)
        choice.broadcast = BroadcastSender(self._group, tensors, layout.offsets, verify is True)
        choice.device = device
        if memory.begin(choice.ipc.bucket_bytes):
            self._release(timeout)

    def _segment_bytes(self, choice: _Choice) -> int:
        """How much shared memory to ask the sidecar for."""
        if choice.transport != "shared_memory" and not (choice.transport == "auto" and self._is_near()):
            return 0
        if choice.device is None:
            return choice.most
        # None where the weights probably stay on the GPU; before it is known where the sidecar is, only as much as makes a good ring.
        if self._sidecars_gpu is None:
            return min(choice.most, _FIRST_SEGMENT)
        stays = self._sidecars_gpu == choice.device.uuid or self._sidecars_gpu and nccl.why_none() is None
        return 0 if stays else choice.most

    def _is_near(self) -> bool:
        if self._near is None:
            self._near = on_this_machine(self._address)
        return self._near

    def _sender(self, ready: Any, choice: _Choice) -> Sender:
        self._sidecars_gpu = bytes(ready.device_uuid)
        if choice.file is not None:
            return choice.file
        if choice.transport == "nccl" and choice.device is not None and ready.device_uuid == choice.device.uuid:
            raise RolloutError(f"transport='nccl' was asked for, but sidecar and tensors are both on {choice.device.name}: use cuda_ipc")
        if choice.ipc is not None and choice.device is not None:
            if ready.device_uuid == choice.device.uuid:
                return choice.ipc
            theirs = f"the sidecar on {cuda.name(ready.device_uuid)}" if ready.device_uuid else "the sidecar has none"
            choice.why_host = f"the tensors are on {choice.device.name}, {theirs}"
            if ready.device_uuid and choice.transport != "cuda_ipc":
                none = nccl.why_none()
                if none is None and choice.broadcast is not None:
                    choice.broadcast.answered(bytes(ready.nccl_unique_id), choice.why_host)
                    return choice.broadcast
                choice.why_host += f", and {none}"
            if choice.transport in _DEVICE:
                raise RolloutError(f"transport={choice.transport!r} was asked for, but {choice.why_host}")
        sender = self._through_host(ready, choice)
        if choice.why_host:
            sender.reason = f"{choice.why_host}: copied to the host; {sender.reason}"
        return sender

    def _through_host(self, ready: Any, choice: _Choice) -> Sender:
        if choice.transport == "inline":
            return InlineSender("transport='inline' was asked for")
        asked = "transport='shared_memory' was asked for, and " if choice.transport == "shared_memory" else ""
        segment = self._lent(ready.segment) if ready.HasField("segment") else None
        if segment is not None:
            return _through(segment, min(len(segment.view), choice.most), choice, f"{asked}the sidecar's memory can be opened here")
        if choice.transport == "auto" and not self._is_near():
            return InlineSender(f"the sidecar at {self._address} is on another machine")
        why = "the sidecar's memory cannot be opened here: it is in another container or another user's" \
            if ready.HasField("segment") else "the sidecar has no memory to lend"
        if choice.transport == "auto":
            return InlineSender(why)
        file = self._own_file(choice.most)
        return _through(file, min(file.capacity, choice.most), choice, f"{asked}{why}: through {file.path}")

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


def _together(shards: ShardGroup, prepared: Callable[[], WeightPush]) -> tuple[WeightPush, list[tuple[list[bytes], int]]]:
    """This rank's push, and the parts of all."""
    pushes: list[WeightPush] = []

    def part() -> tuple[list[bytes], int]:
        pushes.append(prepared())
        return pushes[0].part()

    parts = shards.all(part)
    return pushes[0], parts


class _Choice:
    """What is known of one push when its way is chosen."""

    def __init__(self, transport: Literal["auto"] | Transport, payload_bytes: int, max_shared_memory_bytes: int | None) -> None:
        self.transport = transport
        self.payload_bytes = payload_bytes
        self.most = max(1, payload_bytes if max_shared_memory_bytes is None else min(payload_bytes, max_shared_memory_bytes))
        """Bytes of shared memory to use."""

        self.file: FileSender | None = None
        self.ipc: CudaIpcSender | None = None
        self.broadcast: BroadcastSender | None = None
        self.device: Device | None = None
        """That all tensors are on, where one of these two can be used."""

        self.why_host = ""
        """Where some tensors are on a GPU and neither can."""


def _through(memory: Segment | SharedMemoryFile, capacity: int, choice: _Choice, reason: str) -> Sender:
    if capacity < choice.payload_bytes:
        reason += f"; {capacity:,} bytes of it for a payload of {choice.payload_bytes:,}, used as a ring"
    return SharedMemorySender(memory, capacity, reason)


def _check_transport(
    transport: Literal["auto"] | Transport, folder: str | os.PathLike[str] | None, max_shared_memory_bytes: int | None,
) -> None:
    known = ("auto", *_DEVICE, "shared_memory", "inline", "file")
    if transport not in known:
        raise ValueError(f"transport={transport!r}: expected one of {', '.join(map(repr, known))}")
    if (transport == "file") != (folder is not None):
        raise ValueError(f"folder={folder!r}: transport='file' needs one, and no other transport")
    if max_shared_memory_bytes is not None and max_shared_memory_bytes < 1:
        raise ValueError(f"max_shared_memory_bytes={max_shared_memory_bytes!r}: expected a number of bytes, more than 0")
