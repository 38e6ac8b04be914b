"""Memory that trainer and sidecar share: the sidecar's own, or a file in /dev/shm."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from ..errors import SharedMemoryError
from .payload_file import PayloadFile

FOLDER = Path("/dev/shm")


class Segment:
    """The sidecar's own memory, which it reads without a copy and which ends with it. Kept mapped from push to push."""

    def __init__(self, name: str, path: str, view: memoryview) -> None:
        self.name = name
        self.path = path
        self.view = view

    @classmethod
    def try_open(cls, name: str, path: str, capacity: int) -> Segment | None:
        """None where it cannot be reached: in another container, or as another user. The name is compared to make sure that the path is
        the sidecar's memory."""
        try:
            if os.readlink(path) != f"/memfd:{name} (deleted)":
                return None
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return cls(name, path, memoryview(mmap.mmap(descriptor, capacity)))
        finally:
            os.close(descriptor)  # the mapping stays

    def close(self) -> None:
        """The mapping itself is freed with its last view, which a traceback may still hold."""
        del self.view


class SharedMemoryFile(PayloadFile):
    """A mapped file. All its pages are allocated at once, so a full /dev/shm is an error and not a SIGBUS later."""

    _error = SharedMemoryError
    _remedy = "make it larger (containers: --shm-size)"

    def __init__(self, capacity: int, folder: Path = FOLDER) -> None:
        """Raises SharedMemoryError where there is no room for that many bytes."""
        super().__init__(capacity, folder)

    def close(self) -> None:
        """The mapping itself is freed with its last view, which a traceback may still hold."""
        del self.view
        self._remove()

    def _allocate(self, descriptor: int) -> None:
        super()._allocate(descriptor)
        self.view = memoryview(mmap.mmap(descriptor, self.capacity))
