"""Tensors in the memory of a GPU: PyTorch's, what looks like them, and arrays with ``__cuda_array_interface__``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import cuda

_TEMPORARY_ELEMENTS = 16 << 20  # of converted ones: few enough to have room beside a model, enough for a copy at full speed


@dataclass(frozen=True)
class OnDevice:
    """Where a tensor's elements are."""

    ordinal: int
    """Of the GPU, in this process."""

    pointer: int

    is_as_sent: bool
    """The bytes at the pointer are those to send, in C order."""

    converted: Callable[[int, int], Iterator[Any]] | None
    """The flattened tensor's elements [first, end) as they are sent, as arrays of their own on the same GPU with ``data_ptr()``. None: the
    GPU cannot do it from here."""

    stream: int | None = None
    """Its writes may still be under way there, besides PyTorch's current stream or the default one."""


def is_on_device(value: Any) -> bool:
    return getattr(value, "is_cuda", False) is True or getattr(value, "__cuda_array_interface__", None) is not None


def of_torch(tensor: Any, sent: str) -> OnDevice:
    """
    Args:
        tensor: On a GPU. PyTorch's, or what has its data_ptr, dtype, shape, device, is_contiguous, reshape, to, contiguous and slices.
        sent: Name of the type to send.
    """
    torch = sys.modules.get("torch")
    as_sent = dtype_name(tensor) == sent and bool(tensor.is_contiguous())
    target = getattr(torch, sent, sent)
    return OnDevice(
        int(tensor.device.index), int(tensor.data_ptr()), as_sent, lambda first, end: _converted(tensor, target, first, end))


def dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class DeviceArray:
    """What ``__cuda_array_interface__`` says of an array in C order."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_bfloat16: bool
    stream: int | None

    @staticmethod
    def of(value: Any) -> DeviceArray:
        """Raises TypeError for an array that is not in C order."""
        interface = value.__cuda_array_interface__
        shape, kind = tuple(interface["shape"]), str(interface["typestr"])
        is_bfloat16 = kind[1:] == "V2" and getattr(getattr(value, "dtype", None), "name", "") == "bfloat16"
        dtype = np.dtype("<u2" if is_bfloat16 else kind)
        strides = interface.get("strides")
        if strides is not None and not _in_c_order(shape, strides, dtype.itemsize):
            raise TypeError("is an array on a GPU that is not in C order: make it contiguous")
        return DeviceArray(int(interface["data"][0]), shape, dtype, is_bfloat16, interface.get("stream"))

    def rows(self, first: int, end: int) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        shape = (end - first, *self.shape[1:])
        rows = np.empty(shape, self.dtype)
        if rows.nbytes > 0:
            skipped = first * math.prod(shape[1:]) * self.dtype.itemsize
            read(cuda.ordinal_of(self.pointer), self.pointer + skipped, memoryview(rows).cast("B"), self.stream)
        return rows


def of_array(array: DeviceArray, is_as_sent: bool) -> OnDevice:
    ordinal = cuda.ordinal_of(array.pointer) if math.prod(array.shape) > 0 else 0
    return OnDevice(ordinal, array.pointer, is_as_sent, None, array.stream)


def read(ordinal: int, pointer: int, destination: memoryview, stream: int | None = None) -> None:
    """Copies to the host what the GPU has written when its current work is done."""
    device = cuda.device(ordinal)
    with device.current():
        if stream is not None:
            device.wait(stream)
        device.read(pointer, destination, device.stream())


def copy_rows_of_torch(tensor: Any, sent: str, first: int, end: int, destination: memoryview) -> None:
    """Of a tensor that only looks like PyTorch's: rows [first, end)."""
    place = of_torch(tensor, sent)
    row = math.prod(tuple(tensor.shape)[1:])
    item = destination.nbytes // ((end - first) * row)
    if place.is_as_sent:
        read(place.ordinal, place.pointer + first * row * item, destination)
        return
    assert place.converted is not None
    for part in place.converted(first * row, end * row):
        size = item * math.prod(tuple(part.shape))
        read(place.ordinal, int(part.data_ptr()), destination[:size])
        destination = destination[size:]


def _converted(tensor: Any, dtype: Any, first: int, end: int) -> Iterator[Any]:
    """Elements [first, end) of the flattened tensor, in arrays of limited size."""
    if tensor.is_contiguous():
        tensor = tensor.reshape(-1)
    if len(tensor.shape) == 1:
        for at in range(first, end, _TEMPORARY_ELEMENTS):
            yield tensor[at : min(at + _TEMPORARY_ELEMENTS, end)].to(dtype).contiguous()
        return
    row = math.prod(tuple(tensor.shape)[1:])
    whole, whole_end = -(-first // row), end // row
    if whole > whole_end:  # inside a row
        yield from _converted(tensor[whole_end], dtype, first - whole_end * row, end - whole_end * row)
        return
    if first < whole * row:
        yield from _converted(tensor[whole - 1], dtype, first - (whole - 1) * row, row)
    step = _TEMPORARY_ELEMENTS // row
    for at in range(whole, whole_end, max(1, step)):
        if step == 0:
            yield from _converted(tensor[at], dtype, 0, row)
        else:
            yield tensor[at : min(at + step, whole_end)].to(dtype).contiguous()
    if whole_end * row < end:
        yield from _converted(tensor[whole_end], dtype, 0, end - whole_end * row)


def _in_c_order(shape: Sequence[int], strides: Sequence[int], item: int) -> bool:
    expected = item
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size > 1 and stride != expected:
            return math.prod(shape) == 0
        expected *= size
    return True
