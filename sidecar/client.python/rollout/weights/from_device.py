"""What sending tensors from a GPU takes, whichever way they go."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import CudaError
from . import cuda
from .cuda import Device
from .device_tensors import OnDevice
from .digest import TensorDigest
from .tensors import TensorSource

_READ_BYTES = 8 << 20


def device_of(tensors: Sequence[TensorSource]) -> tuple[Device | None, str]:
    """The GPU that all tensors are on, or None and why they cannot be read there."""
    places = []
    for tensor in tensors:
        if tensor.on_device is None:
            return None, f"{tensor.name!r} is sparse" if tensor.sparse_count is not None else f"{tensor.name!r} is not on a GPU"
        if not tensor.on_device.is_as_sent and tensor.on_device.converted is None:
            return None, f"{tensor.name!r} must be converted, and is not a tensor of PyTorch"
        places.append(tensor.on_device)
    if not places:
        return None, "there are no tensors to send"  # of a rank whose shards others have
    if len({place.ordinal for place in places}) > 1:
        return None, "the tensors are on several GPUs"
    try:
        return cuda.device(places[0].ordinal), ""
    except CudaError as error:
        return None, str(error)


def on_device(tensor: TensorSource) -> OnDevice:
    """Where it is; of one that ``device_of`` has checked."""
    assert tensor.on_device is not None
    return tensor.on_device


def written_by(device: Device, tensors: Sequence[TensorSource]) -> int:
    """The stream whose work so far has written all of them, after waiting for those of arrays that name another."""
    stream = device.stream()
    for other in {on_device(tensor).stream for tensor in tensors}:
        if other is not None and other != stream:
            device.wait(other)
    return stream


def fill(device: Device, stream: int, pointer: int, tensor: TensorSource, start: int, size: int) -> None:
    """Queues a copy of bytes [start, start + size) of a tensor, as they are sent."""
    place = on_device(tensor)
    if place.is_as_sent:
        device.copy(pointer, place.pointer + start, size, stream)
        return
    assert place.converted is not None
    item = tensor.item_bytes
    for part in place.converted(start // item, (start + size) // item):
        # PyTorch may give the part's memory away when the part is gone, but only to work that the stream does later.
        part_bytes = item * math.prod(tuple(part.shape))
        device.copy(pointer, int(part.data_ptr()), part_bytes, stream)
        pointer += part_bytes


class Hashed:
    """Digests of tensors whose bytes on the GPU are copied to the host for that alone."""

    def __init__(self, device: Device, stream: int, count: int) -> None:
        self._device, self._stream = device, stream
        self._tensors = [TensorDigest() for _ in range(count)]
        self._scratch = memoryview(bytearray(_READ_BYTES))

    def add(self, tensor: int, pointer: int, size: int) -> None:
        """The next bytes of a tensor are these, once the stream has done its work so far."""
        for at in range(0, size, len(self._scratch)):
            piece = self._scratch[: min(len(self._scratch), size - at)]
            self._device.read(pointer + at, piece, self._stream)
            self._tensors[tensor].update(piece)

    def digests(self) -> list[bytes]:
        return [tensor.digest() for tensor in self._tensors]
