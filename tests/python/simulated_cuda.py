"""Tensors on the simulated GPU of tests/cuda-sim, which this process and the sidecars it starts share as they would share a real one."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import unittest
from ctypes import byref, c_int, c_size_t, c_void_p
from typing import Any
from unittest import mock

import numpy as np
from support import ROOT

from rollout.weights import cuda

DEVICES = 2
_SIMULATOR = ROOT / "tests/cuda-sim"
_GRANULARITY = 2 << 20


needs_it = unittest.skipIf(shutil.which("g++") is None, "the simulated CUDA device needs g++")


def set_up_module() -> None:
    """Builds it, and sets the environment that selects it for this process and those it starts."""
    if shutil.which("g++") is None:
        return
    built = subprocess.run(["sh", str(_SIMULATOR / "build.sh")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    folder = built.stdout.strip().splitlines()[-1]
    patched = mock.patch.dict(
        os.environ, {cuda.PATH_VARIABLE: folder, "XDG_CACHE_HOME": f"{folder}/cache", "ROLLOUT_SIM_DEVICES": str(DEVICES)})
    patched.start()
    unittest.addModuleCleanup(patched.stop)


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp, up to what is needed."""

    _fields_ = [("type", c_int), ("handle_types", c_int), ("location", _Location), ("rest", ctypes.c_char * 64)]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", c_int)]


def call(name: str, *arguments: Any) -> None:
    result = getattr(cuda._driver(), name)(*arguments)
    assert result == 0, f"{name}: {result}"


def context() -> int | None:
    """This thread's."""
    current = c_void_p()
    call("cuCtxGetCurrent", byref(current))
    return current.value


class Memory:
    """An allocation. Not freed before ``free``."""

    def __init__(self, size: int, device: int = 0, expandable: bool = False) -> None:
        """
        Args:
            expandable: Mapped to reserved addresses, as PyTorch's expandable segments are.
        """
        self.device = device
        pointer = c_void_p()
        with cuda.device(device).current():
            if not expandable:
                call("cuMemAlloc_v2", byref(pointer), c_size_t(max(1, size)))
            else:
                whole = c_size_t(-(-max(1, size) // _GRANULARITY) * _GRANULARITY)
                handle = ctypes.c_ulonglong()
                here = _Location(1, device)
                call("cuMemAddressReserve", byref(pointer), whole, c_size_t(0), None, ctypes.c_ulonglong(0))
                call("cuMemCreate", byref(handle), whole, byref(_Properties(1, 0, here)), ctypes.c_ulonglong(0))
                call("cuMemMap", pointer, whole, c_size_t(0), handle, ctypes.c_ulonglong(0))
                call("cuMemSetAccess", pointer, whole, byref(_Access(here, 3)), c_size_t(1))
        self.pointer = pointer.value or 0

    def write(self, content: bytes, offset: int = 0, stream: Any = None) -> Any:
        """Returns what must be kept until the stream has done it; without a stream it is done."""
        kept = ctypes.create_string_buffer(content, len(content))
        with cuda.device(self.device).current():
            call("cuMemcpyHtoDAsync_v2", c_void_p(self.pointer + offset), kept, c_size_t(len(content)), c_void_p(stream))
        return kept

    def read(self, size: int, offset: int = 0) -> bytes:
        content = bytearray(size)
        if size > 0:
            with cuda.device(self.device).current():
                cuda.device(self.device).read(self.pointer + offset, memoryview(content), 0)
        return bytes(content)

    def free(self) -> None:
        with cuda.device(self.device).current():
            cuda.device(self.device).free(self.pointer)


def stream(device: int = 0) -> int:
    """Its work is done as late as possible."""
    made = c_void_p()
    with cuda.device(device).current():
        call("cuStreamCreate", byref(made), 1)
    return made.value or 0


_KINDS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


class Tensor:
    """Looks like a tensor of PyTorch on a GPU; elements of bfloat16 are their bits. New tensors are kept until the test ends."""

    is_cuda = True
    kept: list[Memory] = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

    def __init__(self, memory: Memory, first: int, kind: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """first and strides: in elements."""
        self.memory, self._first, self._kind, self.shape, self._strides = memory, first, kind, tuple(shape), tuple(strides)
        self.dtype = f"torch.{kind}"
        self.device = Tensor.Device(memory.device)

    @staticmethod
    def of(array: np.ndarray, kind: str, memory: Memory | None = None, offset: int = 0, **where: Any) -> Tensor:
        """A copy of an array, in C order, in memory of its own or at an offset of given memory."""
        array = np.ascontiguousarray(array, _KINDS[kind]).reshape(array.shape)
        if memory is None:
            memory = Memory(array.nbytes + 512, **where)
            offset = 512
            Tensor.kept.append(memory)
        memory.write(array.tobytes(), offset)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return Tensor(memory, offset // array.itemsize, kind, array.shape, strides)

    def data_ptr(self) -> int:
        return self.memory.pointer + self._first * self._item()

    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self._strides)):
            if size > 1 and stride != expected:
                return math.prod(self.shape) == 0
            expected *= size
        return True

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self._strides)) if math.prod(self.shape) > 0 else 0
        flat = np.frombuffer(self.memory.read(span * self._item(), self._first * self._item()), _KINDS[self._kind])
        return np.lib.stride_tricks.as_strided(flat, self.shape, [stride * self._item() for stride in self._strides]).copy()

    def t(self) -> Tensor:
        return Tensor(self.memory, self._first, self._kind, self.shape[::-1], self._strides[::-1])

    def reshape(self, *shape: int) -> Tensor:
        assert self.is_contiguous()
        resolved = np.empty(self.shape, np.uint8).reshape(*shape).shape
        strides = [math.prod(resolved[i + 1 :]) for i in range(len(resolved))]
        return Tensor(self.memory, self._first, self._kind, resolved, tuple(strides))

    def __getitem__(self, rows: int | slice) -> Tensor:
        if isinstance(rows, slice):
            first, end, step = rows.indices(self.shape[0])
            shape, strides = (len(range(first, end, step)), *self.shape[1:]), (self._strides[0] * step, *self._strides[1:])
        else:
            first, shape, strides = rows, self.shape[1:], self._strides[1:]
        return Tensor(self.memory, self._first + first * self._strides[0], self._kind, shape, strides)

    def contiguous(self) -> Tensor:
        return self if self.is_contiguous() else Tensor.of(self.numpy(), self._kind, device=self.memory.device)

    def to(self, dtype: Any) -> Tensor:
        kind = str(dtype).removeprefix("torch.")
        if kind == self._kind:
            return self
        values = self.numpy()
        if kind == "bfloat16":
            return Tensor.of(rounded(values), kind, device=self.memory.device)
        assert self._kind != "bfloat16"
        return Tensor.of(values.astype(_KINDS[kind]), kind, device=self.memory.device)

    def _item(self) -> int:
        return np.dtype(_KINDS[self._kind]).itemsize


class Array:
    """What other libraries have: ``__cuda_array_interface__`` alone."""

    def __init__(self, tensor: Tensor, typestr: str | None = None, stream: int | None = None) -> None:
        kind = np.dtype(_KINDS[tensor.dtype.removeprefix("torch.")])
        self.dtype = kind
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": tensor.shape, "typestr": typestr or kind.str, "data": (tensor.data_ptr(), False), "version": 3, "stream": stream,
            "strides": None if tensor.is_contiguous() else tuple(stride * kind.itemsize for stride in tensor._strides),
        }


def rounded(values: np.ndarray) -> np.ndarray:
    """To bits of bfloat16, to nearest, ties to even; of finite values."""
    bits = values.reshape(-1).astype(np.float32).view(np.uint32).astype(np.int64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).reshape(values.shape)
