"""The offset of each tensor in the payload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _wire as wire
from .tensors import TensorSource

ALIGNMENT = 256
"""Of offsets: a multiple of a cache line, and one that device copies prefer."""


class PayloadLayout:
    """Depends only on names, types and shapes, which stay the same from push to push, so it is computed once."""

    def __init__(self, tensors: Sequence[TensorSource], alignment: int = ALIGNMENT) -> None:
        """
        Args:
            tensors: In payload order.
            alignment: 1 where no gaps are allowed.
        """
        self.manifest: list[Any] = []
        """In the form of the wire."""

        self.offsets: list[int] = []
        self.payload_bytes = 0
        """Up to the end of the last tensor."""

        for tensor in tensors:
            offset = -(-self.payload_bytes // alignment) * alignment
            self.offsets.append(offset)
            self.manifest.append(wire.ManifestTensor(
                name=tensor.name, dtype=wire.TENSOR_DTYPE.number(tensor.dtype.lower(), "dtype"), shape=tensor.shape, offset=offset,
                sparse_count=tensor.sparse_count, first_row=tensor.first_row, rows=tensor.rows or 0))
            self.payload_bytes = offset + tensor.bytes
        self._alignment = alignment
        self._signature = _signature(tensors)

    def fits(self, tensors: Sequence[TensorSource], alignment: int = ALIGNMENT) -> bool:
        """Whether these tensors have this layout."""
        return self._alignment == alignment and self._signature == _signature(tensors)


def _signature(tensors: Sequence[TensorSource]) -> list[tuple[str, str, tuple[int, ...], int | None, int, int | None]]:
    return [(tensor.name, tensor.dtype, tensor.shape, tensor.sparse_count, tensor.first_row, tensor.rows) for tensor in tensors]
