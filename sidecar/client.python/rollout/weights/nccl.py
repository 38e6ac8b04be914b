"""Broadcasts between the GPUs of several processes by NCCL, bound with ctypes: PyTorch brings it, or its package nvidia-nccl.

Native names are kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

from ..errors import CudaError
from . import cuda
from .cuda import Event

ID_BYTES = 128

_FILE = "libnccl.so.2"
_SUCCESS, _IN_PROGRESS = 0, 7  # ncclResult_t
_UINT8 = 1  # ncclDataType_t
_MAGIC, _VERSION = 0xCAFEBEEF, 21400  # NCCL 2.14, the first that has a config

_JOIN_WITHIN = 60.0
_QUEUE_WITHIN = 60.0
_DONE_WITHIN = 86_400.0  # a push's timeout ends it earlier
_SHORT = 0.02  # seconds in which a bucket travels: a wait asks more often


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", c_char * ID_BYTES)]


class _Config(ctypes.Structure):
    """ncclConfig_t of version 2.14. Later ones read as much as the size says, and use defaults for the rest."""

    _fields_ = [("size", c_size_t), ("magic", c_uint), ("version", c_uint), ("blocking", c_int)]


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetUniqueId": (POINTER(_UniqueId),),
    "ncclCommInitRankConfig": (POINTER(c_void_p), c_int, _UniqueId, c_int, POINTER(_Config)),
    "ncclCommGetAsyncError": (c_void_p, POINTER(c_int)),
    "ncclCommAbort": (c_void_p,),
    "ncclBroadcast": (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
}


@functools.cache
def _library() -> Any:
    library = cuda.library(_FILE, inside=("", "nccl/lib"), after=_packages())
    try:
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = c_int
    except AttributeError as error:
        raise CudaError(f"{_FILE} is older than NCCL 2.14: {error}") from error
    library.ncclGetErrorString.argtypes = (c_int,)
    library.ncclGetErrorString.restype = c_char_p
    return library


def _packages() -> Iterator[Path]:
    """Folders of libraries in installed packages, which need not be imported."""
    for package in ("nvidia.nccl", "torch"):
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # there is no package nvidia; or something else has that name
            continue
        for folder in (found and found.submodule_search_locations) or ():
            yield Path(folder, "lib")


def why_none() -> str | None:
    """Why tensors cannot be broadcast from this process; None where they can."""
    try:
        _library()
    except CudaError as error:
        return str(error)
    return None


def new_id() -> bytes:
    """Of a new group. This process has to run until all ranks have joined."""
    made = _UniqueId()
    _check("ncclGetUniqueId", _library().ncclGetUniqueId(byref(made)))
    return bytes(memoryview(made))


def _check(name: str, result: int) -> None:
    if result not in (_SUCCESS, _IN_PROGRESS):
        raise CudaError(f"{name}: {(_library().ncclGetErrorString(result) or b'').decode() or result}")


class Communicator:
    """One rank of a group of processes.

    When a rank dies the others' work never ends. So no call blocks; every wait has a deadline, and calls ``check``, which raises what else
    is to end it; and whatever goes wrong aborts the communicator, so that nothing waits in it any more.

    Its methods need to be within ``current()`` of its device.
    """

    def __init__(self, unique_id: bytes, ranks: int, rank: int, check: Callable[[], object]) -> None:
        """Returns when all ranks have joined.

        Args:
            unique_id: Of ``new_id``, the same for all.

        Raises:
            CudaError: NCCL failed, or a rank has not joined within a minute.
        """
        self._check = check
        self._done: Event | None = Event()
        self._communicator: int | None = None
        made = c_void_p()  # a failure may leave it unchanged, or not
        config = _Config(ctypes.sizeof(_Config), _MAGIC, _VERSION, 0)
        result = _library().ncclCommInitRankConfig(byref(made), ranks, _UniqueId.from_buffer_copy(unique_id), rank, byref(config))
        self._communicator = made.value
        with self._or_end():
            _check("ncclCommInitRankConfig", result)
            self._wait(self._is_idle, _JOIN_WITHIN, f"not all of {ranks} ranks joined")

    @property
    def is_open(self) -> bool:
        return self._communicator is not None

    def use(self, check: Callable[[], object]) -> None:
        """Later waits call this one."""
        self._check = check

    def broadcast(self, pointer: int, size: int, root: int, stream: int) -> None:
        """Queues a copy of the root's bytes to all ranks, each of which must queue the same broadcasts in the same order."""
        with self._or_end():
            _check("ncclBroadcast", _library().ncclBroadcast(pointer, pointer, size, _UINT8, root, self._communicator, stream))
            self._wait(self._is_idle, _QUEUE_WITHIN, f"{size:,} bytes could not be queued")

    def wait(self, stream: int) -> None:
        """Until the work queued on the stream is done."""
        with self._or_end():
            done = self._done
            assert done is not None
            done.record(stream)
            # With the error: where a rank has died the event is never reached.
            self._wait(lambda: self._is_idle() and done.is_reached, _DONE_WITHIN, "a broadcast did not end")

    def close(self) -> None:
        """Leaves the group without telling the others: a sender learns in another way that all have received."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            _check("ncclCommAbort", _library().ncclCommAbort(communicator))
        done, self._done = self._done, None
        if done is not None:
            done.destroy()

    def _is_idle(self) -> bool:
        error = c_int()
        _check("ncclCommGetAsyncError", _library().ncclCommGetAsyncError(self._communicator, byref(error)))
        _check("NCCL", error.value)
        return error.value == _SUCCESS

    def _wait(self, condition: Callable[[], bool], within: float, what: str) -> None:
        started = time.monotonic()
        while not condition():
            self._check()
            waited = time.monotonic() - started
            if waited > within:
                raise CudaError(f"NCCL: {what} within {within:g} s")
            time.sleep(50e-6 if waited < _SHORT else 1e-3)

    @contextlib.contextmanager
    def _or_end(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise
