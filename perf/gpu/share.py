"""Shares two CUDA tensors of PyTorch with the process that started this: one inside an allocation of the caching allocator, and one of as
many bytes as the first line of input says. A line of JSON each; ends when its input does."""
import ctypes, hashlib, json, sys

import torch

cuda = ctypes.CDLL("libcuda.so.1")


def share(tensor):
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), (ctypes.c_ubyte * 64)()
    assert cuda.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(tensor.data_ptr())) == 0
    assert cuda.cuIpcGetMemHandle(handle, base) == 0  # of the whole allocation
    data = tensor.cpu().view(torch.uint8).numpy().tobytes()
    print(json.dumps(dict(
        who=f"torch {torch.__version__}", handle=bytes(handle).hex(), offset=tensor.data_ptr() - base.value, bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest())), flush=True)
    try:  # what torch.multiprocessing would send, for comparison: its handle may have bytes of its own in front
        _, torch_handle, _, torch_offset, *_ = tensor.untyped_storage()._share_cuda_()
        print(f"torch's own handle: {len(torch_handle)} bytes, offset {torch_offset}", file=sys.stderr, flush=True)
    except Exception as error:
        print(f"torch's own handle: {error}", file=sys.stderr, flush=True)


elements = int(sys.stdin.readline()) // 2
before = torch.empty(1 << 20, dtype=torch.bfloat16, device="cuda")  # takes the start of an allocation that the next one shares
inside = torch.empty(1_500_000, dtype=torch.bfloat16, device="cuda").normal_()
everything = torch.empty(elements, dtype=torch.bfloat16, device="cuda").uniform_(-0.035, 0.035)
torch.cuda.synchronize()
share(inside)
share(everything)
sys.stdin.read()
