"""XxHash128 of each tensor's bytes, and over their concatenation in manifest order: what the sidecar compares before it commits.

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

DIGEST_BYTES = 16


class TensorDigest:
    """Of one tensor, piece by piece."""

    def __init__(self) -> None:
        self._hash = None if xxhash is None else xxhash.xxh3_128()

    def update(self, piece: memoryview) -> None:
        if self._hash is not None:
            self._hash.update(piece)

    def digest(self) -> bytes:
        """Sixteen bytes, most significant first; empty without xxhash."""
        return b"" if self._hash is None else bytes(self._hash.digest())


def combine(digests: Iterable[bytes]) -> bytes:
    """Of the whole payload; empty without xxhash or where a tensor's is missing."""
    digests = list(digests)
    if xxhash is None or any(len(digest) != DIGEST_BYTES for digest in digests):
        return b""
    return bytes(xxhash.xxh3_128_digest(b"".join(digests)))
