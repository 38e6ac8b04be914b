"""Weights that go from GPU to GPU: the sidecar, on another one, receives what this process broadcasts by NCCL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .. import _wire as wire
from ..errors import CudaError
from . import nccl
from .call import UpdateCall
from .cuda import Device, Event
from .digest import PIECE_BYTES
from .from_device import Hashed, fill, written_by
from .nccl import Communicator
from .payload import Payload
from .senders import Mode, Transport
from .tensors import TensorSource

_MOST_BUCKET_BYTES = 256 << 20
_ROOT, _SIDECAR, _RANKS = 0, 1, 2
_LAST_WORDS = 1.0  # seconds for the sidecar to say why a broadcast failed


class Group:
    """This process and the sidecar, as ranks: joined once and kept from push to push, as are two buckets. Its methods need to be within
    ``device.current()``, but for ``disconnect`` and ``close``."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.id = b""
        self._communicator: Communicator | None = None
        self._stream = 0
        self._filled: Event | None = None
        self._buckets: list[int] = []
        self._bucket_bytes = self._buckets_for = 0

    def has(self, unique_id: bytes) -> bool:
        return self._communicator is not None and self._communicator.is_open and unique_id == self.id

    def new(self) -> None:
        """Leaves the one that there is. The id is known before the others can join."""
        self.disconnect()
        self.id = nccl.new_id()

    def begin(self, call: UpdateCall) -> None:
        """Joins, where that has not been done. From now on everything that waits for the sidecar ends with this call."""
        if self._communicator is None:
            self._stream, self._filled = self.device.create_stream(), Event()
            self._communicator = Communicator(self.id, _RANKS, _ROOT, call.raise_if_ended)
        self._communicator.use(call.raise_if_ended)

    def buckets(self, wanted: int) -> tuple[list[int], int]:
        """Two, and the size of each: as wanted, or less where there is less memory, but not less than a piece of a digest."""
        if self._buckets_for < wanted:
            self._free()
            self._bucket_bytes = wanted
            while len(self._buckets) < 2:
                try:
                    self._buckets.append(self.device.allocate(self._bucket_bytes))
                except CudaError:  # beside a training step there may be little
                    self._free()
                    if self._bucket_bytes <= PIECE_BYTES:
                        raise
                    self._bucket_bytes = max(PIECE_BYTES, self._bucket_bytes // 2)
            self._buckets_for = wanted
        return self._buckets, self._bucket_bytes

    def broadcast(self, bucket: int, size: int, after: int) -> None:
        """Queues it, to run when the other stream has done its work so far and the sidecar's rank takes part."""
        assert self._communicator is not None and self._filled is not None
        self._filled.record(after)
        self._filled.hold(self._stream)
        self._communicator.broadcast(bucket, size, _ROOT, self._stream)

    def wait(self) -> None:
        """Until all that was queued has been sent."""
        assert self._communicator is not None
        self._communicator.wait(self._stream)

    def disconnect(self) -> None:
        """Leaves the group, and ends what it had queued."""
        with self.device.current():
            if self._communicator is not None:
                self._communicator.close()  # first: its work in the stream may wait for a rank that has died
            if self._filled is not None:
                self._filled.destroy()
                self.device.destroy_stream(self._stream)
        self._communicator, self._filled, self.id = None, None, b""

    def close(self) -> None:
        self.disconnect()
        with self.device.current():
            self._free()

    def _free(self) -> None:
        while self._buckets:
            self.device.free(self._buckets.pop())
        self._buckets_for = 0


class BroadcastSender:
    """Packs tensors into two buckets in turn, one being filled while the other travels."""

    transport: Transport = "nccl"

    reason = ""

    def __init__(self, group: Group, tensors: Sequence[TensorSource], offsets: Sequence[int], verify: bool) -> None:
        """
        Args:
            verify: Copy all bytes to the host to hash them.
        """
        self._group = group
        self._sidecars_id = b""
        self._tensors = tensors
        self._offsets = offsets
        self._verify = verify

    def answered(self, unique_id: bytes, reason: str) -> None:
        """Before ``send``, which needs to be within ``device.current()``.

        Args:
            unique_id: Of the group that the sidecar is in by this connection, as it said; empty: none.
            reason: Why weights go this way.
        """
        self._sidecars_id = unique_id
        self.reason = reason

    def send(self, call: UpdateCall, payload: Payload, mode: Mode) -> int:
        group, device = self._group, self._group.device
        stream = written_by(device, self._tensors)
        hashed = Hashed(device, stream, len(self._tensors)) if self._verify else None
        places = [(offset, tensor.bytes) for tensor, offset in zip(self._tensors, self._offsets)]
        buckets, size = group.buckets(min(_MOST_BUCKET_BYTES, payload.bytes + PIECE_BYTES))
        parts = list(cuts(places, size))
        if parts:
            if not group.has(self._sidecars_id):
                group.new()
            call.send(nccl=self._message(parts))
            try:
                group.begin(call)
                for i, (start, end) in enumerate(parts):
                    self._fill(buckets[i % 2], start, end, stream, hashed)
                    group.wait()  # for the bucket before, and so the next one may be filled again
                    group.broadcast(buckets[i % 2], end - start, stream)
                group.wait()
            except CudaError:
                call.wait_for_end(_LAST_WORDS)  # NCCL says that the other rank is gone, the sidecar why
                call.raise_if_ended()
                raise
        if hashed is not None:
            payload.digests += hashed.digests()
        return parts[-1][1] if parts else 0

    def _message(self, parts: Sequence[tuple[int, int]]) -> Any:
        return wire.Nccl(
            unique_id=self._group.id, rank=_SIDECAR, root=_ROOT, world_size=_RANKS, device_uuid=self._group.device.uuid,
            buckets=[wire.NcclBucket(payload_offset=start, bytes=end - start) for start, end in parts])

    def _fill(self, bucket: int, start: int, end: int, stream: int, hashed: Hashed | None) -> None:
        """Queues copying payload bytes [start, end)."""
        for i, (tensor, offset) in enumerate(zip(self._tensors, self._offsets)):
            first, last = max(start, offset), min(end, offset + tensor.bytes)
            if first < last:
                fill(self._group.device, stream, bucket + first - start, tensor, first - offset, last - first)
                if hashed is not None:
                    hashed.add(i, bucket + first - start, last - first)


def cuts(places: Sequence[tuple[int, int]], capacity: int) -> Iterator[tuple[int, int]]:
    """Parts [start, end) of the payload of at most so many bytes, cut between tensors, or inside one between pieces of its digest.

    Args:
        places: Offset and bytes of each tensor, ascending.
        capacity: At least ``PIECE_BYTES``.
    """
    start: int | None = None  # of the part in the making
    end = 0
    for offset, size in places:
        at = 0
        while at < size:
            room = capacity - (0 if start is None else offset + at - start)
            taken = size - at if size - at <= room else max(0, room // PIECE_BYTES * PIECE_BYTES)
            if taken == 0:
                assert start is not None
                yield start, end
                start = None
                continue
            start = offset + at if start is None else start
            at += taken
            end = offset + at
    if start is not None:
        yield start, end
