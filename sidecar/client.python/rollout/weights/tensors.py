"""The trainer's tensors as a push reads them: name, type, shape, and a way to copy rows directly to the send buffer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
from numpy.typing import NDArray

from . import device_tensors
from .device_tensors import DeviceArray, OnDevice

if TYPE_CHECKING:
    import torch

DType = Literal["BF16", "F16", "F32"]
"""Type of the elements as they are sent, little-endian; with safetensors' names."""

ITEM_BYTES: Mapping[DType, int] = {"BF16": 2, "F16": 2, "F32": 4}
_SENT: Mapping[str, DType] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # names of PyTorch's types

_INDEX_BYTES = 4
_PIECE_BYTES = 1 << 20  # fits a core's cache, so that what was just copied is hashed from the cache


@dataclass(frozen=True)
class BFloat16:
    """A bfloat16 array, for which NumPy has no type: the upper 16 bits of each float32."""

    bits: NDArray[np.uint16]

    def __post_init__(self) -> None:
        if self.bits.dtype != np.uint16:
            raise TypeError(f"the bits of bfloat16 are uint16, not {self.bits.dtype}")


@dataclass(frozen=True)
class SparseTensor:
    """Some elements of a tensor; the others keep their values in the sidecar. For ``Rollout.push_weights``, in place of a tensor."""

    shape: Sequence[int]
    """Of the full tensor."""

    indices: NDArray[Any] | torch.Tensor
    """Integers into the flattened tensor, strictly ascending. Read at each push."""

    values: NDArray[Any] | BFloat16 | torch.Tensor
    """As many, one-dimensional too. Read at each push."""


@dataclass(frozen=True)
class TensorSlice:
    """Rows of a tensor that follow each other, as a rank of FSDP has them. For ``Rollout.push_weights``, in place of a tensor; several
    slices of one tensor are a list of them. Every row must be in one slice."""

    shape: Sequence[int]
    """Of the full tensor."""

    first_row: int
    """Index in dimension 0 of the slice's first row."""

    rows: NDArray[Any] | BFloat16 | torch.Tensor
    """Its rows: their shape differs from the full one in dimension 0 only. Read at each push."""


Weights = Union[
    "torch.nn.Module",
    "Mapping[str, torch.Tensor | SparseTensor | TensorSlice | Sequence[TensorSlice]]",
    "Mapping[str, NDArray[Any] | BFloat16 | SparseTensor | TensorSlice | Sequence[TensorSlice]]",
]

CopyRows = Callable[[int, int, memoryview], None]
"""Copies rows [first, end) to a destination of exactly their size, row-major, converted to the type that is sent."""


@dataclass(frozen=True)
class TensorSource:
    """One tensor to push, or a slice of one. Its rows are those of its first dimension; a scalar has one."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    copy_rows: CopyRows
    """Of a sparse tensor, a row is a value."""

    sparse_count: int | None = None
    """How many of its elements are sent; None: all."""

    copy_indices: CopyRows | None = None
    """The indices of those elements, as uint32."""

    on_device: OnDevice | None = None
    """Where it is on a GPU."""

    first_row: int = 0
    """Of a slice: where it begins in the full tensor, whose shape ``shape`` is."""

    rows: int | None = None
    """Of a slice: how many it has. ``copy_rows`` counts from the slice's first; None: all."""

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """Of what is sent."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    @property
    def item_bytes(self) -> int:
        """Length of an element."""
        return ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """Length of what is sent."""
        return sum(part.rows * part.row_bytes for part in self._parts())

    @property
    def piece_bytes(self) -> int:
        """Bytes of the largest piece that ``copy_to`` writes at once: whole rows, about a mebibyte where they are short enough."""
        return max(min(part.rows, part.piece_rows) * part.row_bytes for part in self._parts())

    def copy_to(self, place: Callable[[int, int], memoryview], done: Callable[[memoryview], object]) -> None:
        """Copies the tensor piece by piece in ascending order.

        Args:
            place: Returns the memory for bytes [start, start + size) of the tensor.
            done: Called with that memory when they have been written.
        """
        start = 0
        for part in self._parts():
            for first in range(0, part.rows if part.row_bytes else 0, part.piece_rows):
                size = (min(first + part.piece_rows, part.rows) - first) * part.row_bytes
                destination = place(start, size)
                part.copy_rows(first, first + size // part.row_bytes, destination)
                done(destination)
                start += size

    def _parts(self) -> list[_Part]:
        item = ITEM_BYTES[self.dtype]
        if self.sparse_count is None or self.copy_indices is None:
            rows = self.sent_shape[0] if self.shape else 1
            return [_Part(rows, item * math.prod(self.shape[1:]), self.copy_rows)]
        return [_Part(self.sparse_count, _INDEX_BYTES, self.copy_indices), _Part(self.sparse_count, item, self.copy_rows)]


@dataclass(frozen=True)
class _Part:
    """Rows of the same length that are sent one after another."""

    rows: int
    row_bytes: int
    copy_rows: CopyRows

    @property
    def piece_rows(self) -> int:
        return max(1, _PIECE_BYTES // max(1, self.row_bytes))


def sources(weights: Weights, dtype: Literal["bfloat16"] | None, may_be_empty: bool = False) -> list[TensorSource]:
    """The tensors of a module, a state dict or a dict of arrays, in its order.

    Raises:
        TypeError: Tensors that cannot be served; lists all of them.
        ValueError: Indices that do not ascend or leave their tensor; lists all of them.
    """
    if dtype not in ("bfloat16", None):
        raise ValueError(f"dtype={dtype!r}: expected 'bfloat16', or None to send them as they are")
    torch = sys.modules.get("torch")  # a caller with a torch tensor has imported it
    if torch is not None and isinstance(weights, torch.nn.Module):
        weights = weights.state_dict()
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a torch module, a state dict or a dict of arrays, got {type(weights).__name__}")
    found: list[TensorSource] = []
    problems: list[str] = []
    misplaced: list[str] = []
    for name, value in weights.items():
        try:
            if hasattr(value, "placements") and hasattr(value, "to_local"):
                found.extend(_from_dtensor(name, value, dtype))
            elif isinstance(value, SparseTensor):
                found.append(_from_sparse(name, value, dtype))
            elif isinstance(value, (list, tuple)):
                found.extend(_from_slice(name, item, dtype) for item in value)
            else:
                found.append(_from_slice(name, value, dtype) if isinstance(value, TensorSlice) else _from_values(name, value, dtype))
        except TypeError as error:
            problems.append(f"{name!r} {error}")
        except ValueError as error:
            misplaced.append(f"{'' if isinstance(value, (TensorSlice, list, tuple)) else 'sparse '}{name!r}: {error}")
    if problems:
        raise TypeError(f"weights: only floating-point tensors can be served: {'; '.join(problems)}")
    if misplaced:
        raise ValueError(f"weights: {'; '.join(misplaced)}")
    if not found and not may_be_empty:
        raise TypeError("weights: an update without tensors")
    return found


def _from_values(name: str, value: Any, dtype: Literal["bfloat16"] | None) -> TensorSource:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(name, value, dtype)
    if device_tensors.is_on_device(value.bits if isinstance(value, BFloat16) else value):
        return _from_device(name, value, dtype)
    if isinstance(value, (np.ndarray, BFloat16)):
        return _from_numpy(name, value, dtype)
    raise TypeError(f"is a {type(value).__name__}")


def _from_device(name: str, value: Any, dtype: Literal["bfloat16"] | None) -> TensorSource:
    """Of what is not PyTorch's own."""
    if getattr(value, "is_cuda", False) is True:
        own = device_tensors.dtype_name(value)
        sent = "bfloat16" if dtype == "bfloat16" else own
        if not own.startswith(("float", "bfloat")) or sent not in _SENT:
            raise TypeError(f"holds {own}")
        tensor = value.reshape(1) if len(value.shape) == 0 else value
        return TensorSource(
            name, _SENT[sent], tuple(value.shape),
            lambda first, end, destination: device_tensors.copy_rows_of_torch(tensor, sent, first, end, destination),
            on_device=device_tensors.of_torch(tensor, sent))

    array = DeviceArray.of(value.bits if isinstance(value, BFloat16) else value)
    shape = array.shape
    array = replace(array, shape=shape or (1,))

    def on_host(first: int, end: int) -> TensorSource:
        rows = array.rows(first, end)
        return _from_numpy(name, BFloat16(rows) if array.is_bfloat16 or isinstance(value, BFloat16) else rows, dtype)

    sent_as = on_host(0, 0).dtype
    is_as_sent = array.dtype == {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[sent_as]
    return TensorSource(
        name, sent_as, shape, lambda first, end, destination: on_host(first, end).copy_rows(0, end - first, destination),
        on_device=device_tensors.of_array(array, is_as_sent))


def _from_sparse(name: str, tensor: SparseTensor, dtype: Literal["bfloat16"] | None) -> TensorSource:
    values = _from_values(name, tensor.values, dtype)
    torch = sys.modules.get("torch")
    given = tensor.indices
    indices = given.detach().cpu().numpy() if torch is not None and isinstance(given, torch.Tensor) else np.asarray(given)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"has indices of {indices.dtype}")
    if indices.ndim != 1 or values.shape != indices.shape:
        raise ValueError(f"values of shape {list(values.shape)} for indices of shape {list(indices.shape)}, both must be flat and as many")
    elements = math.prod(tensor.shape)
    _check_indices(indices, elements)

    def copy_indices(first: int, end: int, destination: memoryview) -> None:
        np.frombuffer(destination, "<u4")[...] = indices[first:end]

    return TensorSource(name, values.dtype, tuple(tensor.shape), values.copy_rows, len(indices), copy_indices)


def _from_slice(name: str, tensor: TensorSlice, dtype: Literal["bfloat16"] | None) -> TensorSource:
    if not isinstance(tensor, TensorSlice):
        raise TypeError(f"is a list with a {type(tensor).__name__}, which is no TensorSlice")
    own = _from_values(name, tensor.rows, dtype)
    shape = tuple(tensor.shape)
    if len(own.shape) == 0 or own.shape[1:] != shape[1:] or len(own.shape) != len(shape):
        raise ValueError(f"a slice of shape {list(own.shape)} of a tensor of shape {list(shape)}: they may differ in dimension 0 only")
    first, rows = tensor.first_row, own.shape[0]
    if rows == 0 or first < 0 or first + rows > shape[0]:
        raise ValueError(f"a slice of {rows} rows from row {first} on, the tensor has {shape[0]}")
    return replace(own, shape=shape, first_row=first, rows=rows)


def _from_dtensor(name: str, tensor: Any, dtype: Literal["bfloat16"] | None) -> list[TensorSource]:
    """The rows that this rank has of PyTorch's DTensor; none where another rank has the same."""
    at = tensor.device_mesh.get_coordinate()
    if at is None:
        return []
    shape = tuple(tensor.shape)
    first, rows = 0, shape[0] if shape else 1
    for dimension, placement in enumerate(tensor.placements):
        kind = type(placement).__name__
        if kind == "Replicate":
            if at[dimension] > 0:
                return []
        elif kind == "Shard" and placement.dim in (0, -len(shape)):
            most = -(-rows // tensor.device_mesh.size(dimension))  # as torch.chunk cuts
            begin = min(at[dimension] * most, rows)
            first, rows = first + begin, min(most, rows - begin)
        else:
            raise TypeError(
                f"is placed as {placement}: slices of the first dimension can be pushed, redistribute it to Shard(0) or Replicate")
    local = tensor.to_local()
    if tuple(local.shape) != (rows, *shape[1:])[: len(shape)]:
        raise TypeError(f"has rows of shape {list(local.shape)} here, expected {rows} of a tensor of shape {list(shape)}")
    if rows == (shape[0] if shape else 1):
        return [_from_values(name, local, dtype)]
    return [_from_slice(name, TensorSlice(shape, first, local), dtype)] if rows > 0 else []


def _check_indices(indices: NDArray[Any], elements: int) -> None:
    """The sidecar checks them too, but in place that is after the weights in service have been touched."""
    for wrong, say in (
        (np.append(False, indices[1:] <= indices[:-1]), lambda i: f"index {i} is {indices[i]} after {indices[i - 1]}, they must ascend"),
        ((indices < 0) | (indices >= elements), lambda i: f"index {i} is {indices[i]}, the tensor has {elements} elements"),
    ):
        if wrong.any():
            raise ValueError(say(int(wrong.argmax())))


def _from_torch(name: str, tensor: torch.Tensor, dtype: Literal["bfloat16"] | None) -> TensorSource:
    import torch

    kept: dict[torch.dtype, DType] = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    if not tensor.is_floating_point() or dtype is None and tensor.dtype not in kept:
        raise TypeError(f"holds {tensor.dtype}")
    sent = torch.bfloat16 if dtype == "bfloat16" else tensor.dtype
    values = tensor.detach() if tensor.dim() > 0 else tensor.detach().reshape(1)
    on_device = device_tensors.of_torch(values, str(sent).removeprefix("torch.")) if values.is_cuda else None

    def copy_rows(first: int, end: int, destination: memoryview) -> None:
        # The only copy, for any strides, type and device.
        torch.frombuffer(destination, dtype=sent).view(values[first:end].shape).copy_(values[first:end])

    return TensorSource(name, kept[sent], tuple(tensor.shape), copy_rows, on_device=on_device)


def _from_numpy(name: str, array: NDArray[Any] | BFloat16, dtype: Literal["bfloat16"] | None) -> TensorSource:
    if isinstance(array, np.ndarray) and array.dtype.name == "bfloat16":  # a type of ml_dtypes
        array = BFloat16(array.view(np.uint16))
    if isinstance(array, BFloat16):
        return _copied(name, "BF16", array.bits, "<u2")
    if array.dtype.kind != "f":
        hint = "; wrap bfloat16 bits in rollout.BFloat16" if array.dtype == np.uint16 else ""
        raise TypeError(f"holds {array.dtype}{hint}")
    if dtype == "bfloat16":
        return _rounded(name, array)
    if array.dtype == np.float16:
        return _copied(name, "F16", array, "<f2")
    if array.dtype == np.float32:
        return _copied(name, "F32", array, "<f4")
    raise TypeError(f"holds {array.dtype}")


def _copied(name: str, dtype: DType, array: NDArray[Any], element: str) -> TensorSource:
    values = np.atleast_1d(array)

    def copy_rows(first: int, end: int, destination: memoryview) -> None:
        np.frombuffer(destination, element).reshape(values[first:end].shape)[...] = values[first:end]

    return TensorSource(name, dtype, array.shape, copy_rows)


def _rounded(name: str, array: NDArray[Any]) -> TensorSource:
    values = np.atleast_1d(array)

    def copy_rows(first: int, end: int, destination: memoryview) -> None:
        rows = np.ascontiguousarray(values[first:end], np.float32)
        bits = rows.view(np.uint32)
        # To nearest, ties to even: (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, without an array for each step.
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        sent = np.frombuffer(destination, "<u2").reshape(rows.shape)
        sent[...] = rounded
        not_a_number = np.isnan(rows)
        if not_a_number.any():
            sent[not_a_number] = 0x7FC0  # NaNs whose rounding wrapped around

    return TensorSource(name, "BF16", array.shape, copy_rows)
