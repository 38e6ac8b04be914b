"""Memory that trainer and sidecar share: the sidecar's own, or files of /dev/shm that a killed trainer does not leave behind for long."""

from __future__ import annotations

import atexit
import fcntl
import mmap
import os
import re
import secrets
from pathlib import Path

from ..errors import SharedMemoryError

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"rollout-([0-9]+)-[0-9a-f]{16}")

# Files of this process that still exist. Not removed by a signal handler: one written in Python would keep SIGTERM from ending a trainer
# that hangs in native code. The next client removes files that a signal left behind.
_live: set[Path] = set()


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


class SharedMemoryFile:
    """One file, readable by this user alone. All its pages are allocated at once, so a full /dev/shm is an error and not a SIGBUS later.

    Removed when it is closed or the process ends; the next process removes the file of a killed one.
    """

    def __init__(self, capacity: int, folder: Path = FOLDER) -> None:
        """Raises SharedMemoryError where there is no room for that many bytes."""
        remove_leftovers(folder)
        self.capacity = capacity
        self.path = folder / f"rollout-{os.getpid()}-{secrets.token_hex(8)}"
        self._owner = os.getpid()
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SharedMemoryError(f"no file can be made in {folder}: {error.strerror}") from error
        _live.add(self.path)
        try:
            # The lock tells processes in other containers, which cannot see our process id, that we are alive.
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            os.posix_fallocate(self._descriptor, 0, capacity)
            self.view = memoryview(mmap.mmap(self._descriptor, capacity))
        except OSError as error:
            self._remove()
            raise SharedMemoryError(
                f"{capacity:,} bytes of shared memory are needed in {folder}, {_free(folder)} are free. Make it larger (containers: "
                f"--shm-size) or push with transport='inline'. ({error.strerror})") from error

    @property
    def exists(self) -> bool:
        """Whether another process can still open it."""
        return self.path.exists()

    def close(self) -> None:
        """The mapping itself is freed with its last view, which a traceback may still hold."""
        del self.view
        self._remove()

    def _remove(self) -> None:
        os.close(self._descriptor)
        if self._owner == os.getpid():  # a forked child must not remove its parent's file
            self.path.unlink(missing_ok=True)
            _live.discard(self.path)


def remove_leftovers(folder: Path = FOLDER) -> int:
    """Removes files of processes that have ended. Returns their number."""
    removed = 0
    for path in folder.glob("rollout-*"):
        name = _NAME.fullmatch(path.name)
        if name and not _lives(int(name[1])) and _unlocked(path):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    except OSError:  # hidden, or just ended
        return Path(f"/proc/{pid}").exists()
    # A zombie counts as ended too: in containers it may stay for long.
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _unlocked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # another user's, or just removed
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _free(folder: Path) -> str:
    try:
        status = os.statvfs(folder)
    except OSError:
        return "not known how many"
    return f"{status.f_bavail * status.f_frsize:,}"


@atexit.register
def _remove_live() -> None:
    for path in _live:
        if path.name.startswith(f"rollout-{os.getpid()}-"):  # a forked child must not remove it
            path.unlink(missing_ok=True)
