"""The offset of each tensor in the payload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _wire as wire
from .tensors import TensorSource

_ALIGNMENT = 256  # bytes: a multiple of a cache line, and an alignment that device copies prefer


class PayloadLayout:
    """Depends only on names, types and shapes, which stay the same from push to push, so it is computed once."""

    def __init__(self, tensors: Sequence[TensorSource]) -> None:
        self.manifest: list[Any] = []
        """In the form of the wire."""

        self.offsets: list[int] = []
        self.payload_bytes = 0
        """Up to the end of the last tensor."""

        for tensor in tensors:
            offset = -(-self.payload_bytes // _ALIGNMENT) * _ALIGNMENT
            self.offsets.append(offset)
            self.manifest.append(wire.ManifestTensor(
                name=tensor.name, dtype=wire.TENSOR_DTYPE.number(tensor.dtype.lower(), "dtype"), shape=tensor.shape, offset=offset))
            self.payload_bytes = offset + tensor.bytes
        self._signature = _signature(tensors)

    def fits(self, tensors: Sequence[TensorSource]) -> bool:
        """Whether these tensors have this layout."""
        return self._signature == _signature(tensors)


def _signature(tensors: Sequence[TensorSource]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
