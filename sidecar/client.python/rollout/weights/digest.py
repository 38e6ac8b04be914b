"""Digests of weights as protos/rollout/v1/DEFINITIONS.md defines them: what the sidecar compares before it commits.

Needs the package xxhash. Without it nothing is hashed here, the digest that is sent is empty, and bytes that change in transit are not
detected.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

xxhash: Any
try:
    import xxhash
except ImportError:
    xxhash = None

ALGORITHM = "xxh3-128-tree-131072"
"""The name of this algorithm in the weights protocol."""

DIGEST_BYTES = 16
PIECE_BYTES = 131072
"""A tensor's digest is that of the digests of its pieces; all but the last have this length."""


class TensorDigest:
    """Of one tensor, whose bytes come in order, in any cuts."""

    def __init__(self) -> None:
        self._pieces = bytearray()  # digests
        self._partial: Any = None  # hash of a piece whose bytes come in several calls
        self._left = PIECE_BYTES  # bytes that it lacks

    def update(self, part: memoryview) -> None:
        if xxhash is None:
            return
        at = 0
        while at < len(part):
            own = part[at : at + self._left]
            at += len(own)
            if len(own) == PIECE_BYTES:
                self._pieces += xxhash.xxh3_128_digest(own)
                continue
            if self._partial is None:
                self._partial = xxhash.xxh3_128()
            self._partial.update(own)
            self._left -= len(own)
            if self._left == 0:
                self._pieces += self._partial.digest()
                self._partial, self._left = None, PIECE_BYTES

    def digest(self) -> bytes:
        """Sixteen bytes, most significant first; empty without xxhash."""
        if xxhash is None:
            return b""
        last = b"" if self._partial is None else self._partial.digest()
        return bytes(xxhash.xxh3_128_digest(bytes(self._pieces) + last))


def combine(digests: Iterable[bytes]) -> bytes:
    """Of the whole payload; empty without xxhash or where a tensor's is missing."""
    digests = list(digests)
    if xxhash is None or any(len(digest) != DIGEST_BYTES for digest in digests):
        return b""
    return bytes(xxhash.xxh3_128_digest(b"".join(digests)))
