"""Files that a killed trainer does not leave behind for long."""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import secrets
from pathlib import Path

from ..errors import PayloadFileError

_NAME = re.compile(r"rollout-([0-9]+)-[0-9a-f]{16}")

# Files of this process that still exist. Not removed by a signal handler: one written in Python would keep SIGTERM from ending a trainer
# that hangs in native code. The next client removes files that a signal left behind.
_live: set[Path] = set()


class PayloadFile:
    """One file, readable by this user alone. All its bytes are allocated at once, so a full disk is an error here and not half-way.

    Removed when it is closed or the process ends; the next process removes the file of a killed one.
    """

    _error: type[PayloadFileError] = PayloadFileError
    _remedy = "give another folder"

    def __init__(self, capacity: int, folder: str | os.PathLike[str]) -> None:
        """Raises PayloadFileError where there is no such folder or no room for that many bytes."""
        folder = Path(folder).absolute()
        remove_leftovers(folder)
        self.capacity = capacity
        self.path = folder / f"rollout-{os.getpid()}-{secrets.token_hex(8)}"
        self._owner = os.getpid()
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._error(f"no file can be made in {folder}: {error.strerror}") from error
        _live.add(self.path)
        try:
            # The lock tells processes in other containers, which cannot see our process id, that we are alive.
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            self._allocate(self._descriptor)
        except OSError as error:
            self._remove()
            raise self._error(
                f"{capacity:,} bytes are needed in {folder}, {_free_text(folder)} are free: {self._remedy}, or push with "
                f"transport='inline'. ({error.strerror})") from error

    @property
    def exists(self) -> bool:
        """Whether another process can still open it."""
        return self.path.exists()

    def close(self) -> None:
        self._remove()

    def _allocate(self, descriptor: int) -> None:
        os.posix_fallocate(descriptor, 0, self.capacity)

    def _remove(self) -> None:
        os.close(self._descriptor)
        if self._owner == os.getpid():  # a forked child must not remove its parent's file
            self.path.unlink(missing_ok=True)
            _live.discard(self.path)


def remove_leftovers(folder: Path) -> int:
    """Removes files of processes that have ended. Returns their number."""
    removed = 0
    for path in folder.glob("rollout-*"):
        name = _NAME.fullmatch(path.name)
        if name and not _lives(int(name[1])) and _unlocked(path):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def free_bytes(folder: Path) -> int | None:
    """Of the folder's file system; None where it does not say."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


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


def _free_text(folder: Path) -> str:
    free = free_bytes(folder)
    return "not known how many" if free is None else f"{free:,}"


@atexit.register
def _remove_live() -> None:
    for path in _live:
        if path.name.startswith(f"rollout-{os.getpid()}-"):  # a forked child must not remove it
            path.unlink(missing_ok=True)
