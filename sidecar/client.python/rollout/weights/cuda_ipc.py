"""Weights that stay on the GPU: the sidecar, on the same one, reads them in the trainer's memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import _wire as wire
from ..errors import CudaError
from .call import UpdateCall
from .cuda import Allocation, Device, SharedEvent
from .digest import PIECE_BYTES
from .from_device import Hashed, fill, on_device, written_by
from .payload import Payload
from .senders import Mode, Transport
from .tensors import TensorSource

_MOST_BUCKET_BYTES = 256 << 20
_LEAST_BUCKET_BYTES = 2 << 20  # smaller allocations of the driver share one of this size, which a handle would share whole
_ALIGNMENT = 256


class _Slot:
    """A bucket, where one is needed, and what marks that a message's memory is written. Reused when the sidecar has read the message."""

    def __init__(self) -> None:
        self.event = SharedEvent()
        self.bucket: Allocation | None = None
        self.bucket_for = 0  # bytes that it was meant to have; there may have been less memory
        self.until = 0  # payload byte at which its last message ends


class DeviceMemory:
    """What a publisher shares of a GPU's memory, kept from push to push: handles of the trainer's allocations, and two buckets of its own.
    Its methods need to be within ``device.current()``, but for ``close``."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.slots: list[_Slot] = []
        self._wanted = 0
        self._handles: dict[int, tuple[Allocation, bytes]] = {}  # by where the allocation starts

    def begin(self, bucket_bytes: int) -> bool:
        """Before a push: makes room for buckets of at least that size together, or as much as is useful.

        Returns:
            Whether memory has been freed that the sidecar may have opened: it has to close all before this push.
        """
        if not self.slots:
            self.slots = [_Slot(), _Slot()]
        for slot in self.slots:
            slot.until = 0
        wanted = min(max(_LEAST_BUCKET_BYTES, -(-bucket_bytes // _LEAST_BUCKET_BYTES) * _LEAST_BUCKET_BYTES), _MOST_BUCKET_BYTES)
        freed = any(not self.device.still_has(allocation) for allocation, _ in self._handles.values())
        for slot in self.slots:
            if slot.bucket is not None and slot.bucket_for < wanted:
                self.device.free(slot.bucket.start)
                slot.bucket, freed = None, True
        if freed:
            self._handles.clear()
        self._wanted = wanted
        return freed

    def bucket(self, slot: _Slot) -> Allocation:
        """The slot's, allocated where it has none."""
        size = slot.bucket_for = self._wanted if slot.bucket is None else slot.bucket_for
        while slot.bucket is None:
            try:
                slot.bucket = self.device.allocation_of(self.device.allocate(size))
            except CudaError:  # beside a training step there may be little memory: more messages, then
                if size <= _LEAST_BUCKET_BYTES:
                    raise
                size = max(_LEAST_BUCKET_BYTES, size // 2)
        return slot.bucket

    def handle(self, allocation: Allocation) -> bytes:
        if allocation.start not in self._handles:
            self._handles[allocation.start] = (allocation, self.device.handle(allocation.start))
        return self._handles[allocation.start][1]

    def close(self) -> None:
        """Frees the buckets. The sidecar has closed them with the connection, or keeps their memory until it does."""
        with self.device.current():
            for slot in self.slots:
                slot.event.destroy()
                if slot.bucket is not None:
                    self.device.free(slot.bucket.start)
        self.slots = []
        self._handles.clear()


class CudaIpcSender:
    """Names the trainer's memory to the sidecar. What cannot be named or is not as it is sent is copied to a bucket first, on the GPU."""

    transport: Transport = "cuda_ipc"

    def __init__(self, memory: DeviceMemory, tensors: Sequence[TensorSource], offsets: Sequence[int], verify: bool, reason: str) -> None:
        """Needs to be within ``memory.device.current()``, as ``send``.

        Args:
            verify: Copy all bytes to the host to hash them.
        """
        self.reason = reason
        self._memory = memory
        self._tensors = tensors
        self._offsets = offsets
        self._verify = verify
        # Of each tensor, the allocation to name it in; None: it goes through a bucket.
        self._named: list[Allocation | None] = []
        through = [tensor for tensor in tensors if not self._add(tensor)]
        self.bucket_bytes = sum(-(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT for tensor in through)
        """That it needs for all tensors which go through them."""

        if self.bucket_bytes > 0:
            self.reason += f"; {sum(tensor.bytes for tensor in through):,} bytes of {len(through)} tensors are copied there first"

    def send(self, call: UpdateCall, payload: Payload, mode: Mode) -> int:
        device = self._memory.device
        stream = self._stream = written_by(device, self._tensors)
        slots = itertools.cycle(self._memory.slots)
        message = _Message(self._memory, next(slots), call, stream)
        hashed = Hashed(device, stream, len(self._tensors)) if self._verify else None
        for i, (tensor, offset, named) in enumerate(zip(self._tensors, self._offsets, self._named)):
            sent = 0
            while sent < tensor.bytes:
                size = tensor.bytes if named is not None else message.room(tensor.bytes - sent)
                if size == 0:
                    message.send()
                    message = _Message(self._memory, next(slots), call, stream)
                    continue
                allocation, pointer = self._place(message, tensor, named, sent, size)
                message.add(allocation, pointer, offset + sent, size)
                if hashed is not None:
                    hashed.add(i, pointer, size)
                sent += size
        if hashed is not None:
            payload.digests += hashed.digests()
        message.send()
        return max(slot.until for slot in self._memory.slots)

    def _place(
        self, message: _Message, tensor: TensorSource, named: Allocation | None, start: int, size: int,
    ) -> tuple[Allocation, int]:
        """Where a tensor's bytes [start, start + size) are, after copying them to the message's bucket where they cannot be named."""
        if named is not None:
            return named, on_device(tensor).pointer
        bucket, pointer = message.take(size)
        fill(self._memory.device, self._stream, pointer, tensor, start, size)
        return bucket, pointer

    def _add(self, tensor: TensorSource) -> bool:
        place = on_device(tensor)
        named = None
        if place.is_as_sent and tensor.bytes > 0:
            allocation = self._memory.device.allocation_of(place.pointer)
            if allocation.can_be_shared and place.pointer + tensor.bytes <= allocation.start + allocation.bytes:
                named = allocation
        self._named.append(named)
        return named is not None


@dataclass
class _Message:
    """One, in the making."""

    memory: DeviceMemory
    slot: _Slot
    call: UpdateCall
    stream: int
    _used: int = 0
    _ready: bool = False
    _index: dict[int, int] = field(default_factory=dict)  # of an allocation in the message, by its start
    _allocations: list[Any] = field(default_factory=list)
    _ranges: list[Any] = field(default_factory=list)

    def room(self, left: int) -> int:
        """How many of a tensor's remaining bytes fit the bucket: all, or else a multiple of a digest's piece."""
        self._wait()
        free = self.memory.bucket(self.slot).bytes - self._used
        return left if left <= free else free // PIECE_BYTES * PIECE_BYTES

    def take(self, size: int) -> tuple[Allocation, int]:
        """That much of the bucket: the bucket and a pointer into it."""
        bucket = self.memory.bucket(self.slot)
        pointer = bucket.start + self._used
        self._used = min(bucket.bytes, -(-(self._used + size) // _ALIGNMENT) * _ALIGNMENT)
        return bucket, pointer

    def add(self, allocation: Allocation, pointer: int, payload_offset: int, size: int) -> None:
        """A range."""
        if allocation.start not in self._index:
            self._index[allocation.start] = len(self._allocations)
            self._allocations.append(wire.CudaAllocation(
                kind=wire.CUDA_HANDLE_KIND.number("legacy", "kind"), handle=self.memory.handle(allocation),
                device_uuid=self.memory.device.uuid))
        self._ranges.append(wire.CudaRange(
            allocation=self._index[allocation.start], offset=pointer - allocation.start, payload_offset=payload_offset, bytes=size))
        self._end = payload_offset + size

    def send(self) -> None:
        if not self._ranges:
            return
        self._wait()
        self.slot.event.record(self.stream)
        self.call.send(cuda_ipc=wire.CudaIpc(allocations=self._allocations, ranges=self._ranges, ready_event=self.slot.event.handle))
        self.slot.until = self._end

    def _wait(self) -> None:
        """Until the sidecar has read the slot's last message."""
        if not self._ready:
            self.call.received(self.slot.until)
            self._ready = True
