"""The bytes of a push."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .digest import TensorDigest, combine
from .layout import PayloadLayout
from .tensors import TensorSource


class Payload:
    """The tensors' bytes at their offsets: copied out of the trainer once, piece by piece, and hashed while they are in the cache."""

    def __init__(self, layout: PayloadLayout, tensors: Sequence[TensorSource], hashed: bool) -> None:
        self.bytes = layout.payload_bytes
        self.piece_bytes = max((tensor.piece_bytes for tensor in tensors), default=0)
        """Of the largest piece."""

        self._tensors = tensors
        self._offsets = layout.offsets
        self._hashed = hashed
        self.digests: list[bytes] = []
        """Of the tensors, once they have been copied; empty where they are not hashed."""

    def copy_to(self, place: Callable[[int, int], memoryview], done: Callable[[int, memoryview], object]) -> None:
        """Copies everything but the gaps between tensors, in ascending order.

        Args:
            place: Returns the memory for payload bytes [start, start + size), which are of one tensor.
            done: Called with the start and that memory when they have been written.
        """
        for tensor, offset in zip(self._tensors, self._offsets):
            digest, start = TensorDigest(), offset

            def placed(at: int, size: int, offset: int = offset) -> memoryview:
                nonlocal start
                start = offset + at
                return place(start, size)

            def written(piece: memoryview, digest: TensorDigest = digest) -> None:
                if self._hashed:
                    digest.update(piece)
                done(start, piece)

            tensor.copy_to(placed, written)
            if self._hashed:
                self.digests.append(digest.digest())

    def digest(self) -> bytes:
        """Of all tensors, once they have been copied; empty where they are not hashed."""
        return combine(self.digests) if self.digests else b""
