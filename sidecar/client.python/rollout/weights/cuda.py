"""Memory and events of an NVIDIA GPU by its driver, bound with ctypes: no CUDA package is needed.

Native names are kept. Pointers, streams and events are Python integers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CudaError

PATH_VARIABLE = "ROLLOUT_CUDA_PATH"
"""Folders to look for libraries in first, separated by colons."""

HANDLE_BYTES = 64
UUID_BYTES = 16

_FILE = "libcuda.so.1"
_SUCCESS, _NOT_READY = 0, 600  # CUresult
# Of a container's host, of Debian and Ubuntu, of WSL: after the loader, which may be configured for a newer driver's library.
_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib")

_BUFFER_ID, _DEVICE_ORDINAL, _IS_LEGACY_IPC_CAPABLE = 7, 9, 10  # CU_POINTER_ATTRIBUTE_
_DISABLE_TIMING, _INTERPROCESS = 2, 4  # CU_EVENT_
_NON_BLOCKING = 1  # CU_STREAM_: the default stream does not wait for it, nor it for that one


class _Handle(ctypes.Structure):
    """CUipcMemHandle, CUipcEventHandle."""

    _fields_ = [("reserved", c_char * HANDLE_BYTES)]


class _Uuid(ctypes.Structure):
    _fields_ = [("bytes", c_char * UUID_BYTES)]


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetUuid_v2": (POINTER(_Uuid), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetAddressRange_v2": (POINTER(c_void_p), POINTER(c_size_t), c_void_p),
    "cuPointerGetAttribute": (c_void_p, c_int, c_void_p),
    "cuMemAlloc_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFree_v2": (c_void_p,),
    "cuMemcpyDtoDAsync_v2": (c_void_p, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_void_p, c_size_t, c_void_p),
    "cuIpcGetMemHandle": (POINTER(_Handle), c_void_p),
    "cuIpcGetEventHandle": (POINTER(_Handle), c_void_p),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
}


def library(file: str, inside: Sequence[str] = ("",), after: Iterable[str | Path] = ()) -> Any:
    """Loads it from the first place that has it: ``ROLLOUT_CUDA_PATH``, where the system's loader looks, other folders.

    Args:
        inside: Where in a folder of ``ROLLOUT_CUDA_PATH`` it may be.
        after: Those other folders.

    Raises:
        CudaError: It is in none of them.
    """
    named = [Path(folder, part, file) for folder in os.environ.get(PATH_VARIABLE, "").split(":") if folder for part in inside]
    candidates = [*filter(Path.exists, named), file, *filter(Path.exists, (Path(folder, file) for folder in after))]
    for candidate in candidates:
        try:
            return ctypes.CDLL(str(candidate))
        except OSError:
            continue
    raise CudaError(f"CUDA needs {file}, which the system's loader does not know; set {PATH_VARIABLE} to the folder that has it")


@functools.cache
def _driver() -> Any:
    driver = library(_FILE, after=_FOLDERS)
    for name, arguments in _SIGNATURES.items():
        getattr(driver, name).argtypes = arguments
        getattr(driver, name).restype = c_int
    _call("cuInit", 0, library=driver)
    return driver


def _call(name: str, *arguments: Any, library: Any = None, also: int = _SUCCESS) -> int:
    """Returns the result, which is success or ``also``."""
    library = library or _driver()
    result = int(getattr(library, name)(*arguments))
    if result not in (_SUCCESS, also):
        text = c_char_p()
        library.cuGetErrorName(result, byref(text))
        raise CudaError(f"{name}: {(text.value or b'').decode() or result}")
    return result


@dataclass(frozen=True)
class Allocation:
    """What a pointer lies in."""

    start: int
    bytes: int
    identity: int
    """Never given to two allocations of this process, even at the same address."""

    can_be_shared: bool
    """Whether ``Device.handle`` can name it for other processes: not where its memory is mapped to reserved addresses, as that of PyTorch's
    expandable segments is."""


class Device:
    """A GPU in the primary context, which PyTorch and the runtime use too. Its methods need to be within ``current()``."""

    def __init__(self, ordinal: int) -> None:
        """Raises CudaError where there is no such GPU, or no driver."""
        uuid, context = _Uuid(), c_void_p()
        _call("cuDeviceGetUuid_v2", byref(uuid), ordinal)
        _call("cuDevicePrimaryCtxRetain", byref(context), ordinal)  # until the process ends: others rely on it too
        self.ordinal = ordinal
        self.uuid = bytes(memoryview(uuid))
        self._context = context

    @property
    def name(self) -> str:
        return name(self.uuid)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes its context the thread's, and the one before the thread's again."""
        before = c_void_p()
        _call("cuCtxGetCurrent", byref(before))
        _call("cuCtxSetCurrent", self._context)
        try:
            yield
        finally:
            _call("cuCtxSetCurrent", before)

    def stream(self) -> int:
        """That of the work which may still write tensors: PyTorch's current one, else the default stream."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return 0
        return int(torch.cuda.current_stream(self.ordinal).cuda_stream)

    def allocation_of(self, pointer: int) -> Allocation:
        start, size, identity, can_be_shared = c_void_p(), c_size_t(), c_uint64(), c_int()
        _call("cuMemGetAddressRange_v2", byref(start), byref(size), pointer)
        _call("cuPointerGetAttribute", byref(identity), _BUFFER_ID, pointer)
        _call("cuPointerGetAttribute", byref(can_be_shared), _IS_LEGACY_IPC_CAPABLE, pointer)
        return Allocation(start.value or 0, size.value, identity.value, can_be_shared.value != 0)

    def still_has(self, allocation: Allocation) -> bool:
        """Whether it has not been freed."""
        try:
            return self.allocation_of(allocation.start).identity == allocation.identity
        except CudaError:  # nothing is there
            return False

    def handle(self, pointer: int) -> bytes:
        """By which another process opens the allocation, as long as this one keeps it."""
        handle = _Handle()
        _call("cuIpcGetMemHandle", byref(handle), pointer)
        return bytes(memoryview(handle))

    def allocate(self, size: int) -> int:
        pointer = c_void_p()
        _call("cuMemAlloc_v2", byref(pointer), size)
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        _call("cuMemFree_v2", pointer)

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        """Between places on the GPU, when the stream gets there."""
        _call("cuMemcpyDtoDAsync_v2", destination, source, size, stream)

    def read(self, source: int, destination: memoryview, stream: int) -> None:
        """To the host, after the stream's earlier work; returns when it is there."""
        _call("cuMemcpyDtoHAsync_v2", ctypes.addressof(c_char.from_buffer(destination)), source, destination.nbytes, stream)
        self.wait(stream)

    def wait(self, stream: int) -> None:
        """Until all its work is done."""
        _call("cuStreamSynchronize", stream)

    def create_stream(self) -> int:
        """One whose work runs beside that of all others."""
        stream = c_void_p()
        _call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        _call("cuStreamDestroy_v2", stream)


class Event:
    """A mark in a stream."""

    def __init__(self, flags: int = 0) -> None:
        event = c_void_p()
        _call("cuEventCreate", byref(event), _DISABLE_TIMING | flags)
        self._event = event

    def record(self, stream: int) -> None:
        """It is reached when the stream's work so far is done."""
        _call("cuEventRecord", self._event, stream)

    @property
    def is_reached(self) -> bool:
        return _call("cuEventQuery", self._event, also=_NOT_READY) == _SUCCESS

    def hold(self, stream: int) -> None:
        """The stream's later work waits until it is reached, as it was recorded last."""
        _call("cuStreamWaitEvent", stream, self._event, 0)

    def destroy(self) -> None:
        _call("cuEventDestroy_v2", self._event)


class SharedEvent(Event):
    """That another process can wait for."""

    def __init__(self) -> None:
        super().__init__(_INTERPROCESS)
        handle = _Handle()
        _call("cuIpcGetEventHandle", byref(handle), self._event)
        self.handle = bytes(memoryview(handle))


_devices: dict[int, Device] = {}
_lock = threading.Lock()


def device(ordinal: int) -> Device:
    """The GPU of this number in this process."""
    with _lock:
        if ordinal not in _devices:
            _devices[ordinal] = Device(ordinal)
        return _devices[ordinal]


def ordinal_of(pointer: int) -> int:
    """Of the GPU that has this memory."""
    context, ordinal = c_void_p(), c_int()
    _call("cuCtxGetCurrent", byref(context))
    with contextlib.nullcontext() if context.value else device(0).current():
        _call("cuPointerGetAttribute", byref(ordinal), _DEVICE_ORDINAL, pointer)
    return ordinal.value


def name(uuid: bytes) -> str:
    """As nvidia-smi writes it."""
    digits = uuid.hex()
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
