"""A trainer whose first weights the sidecar has read on the GPU, and which stays there until it is killed: run by test_cuda_ipc."""

from __future__ import annotations

import sys
import time

from simulated_cuda import Tensor
from support import other_weights

from rollout import Rollout
from rollout.weights import cuda_ipc
from rollout.weights.call import UpdateCall

send = UpdateCall.send


def send_and_stay(call: UpdateCall, **step: object) -> None:
    send(call, **step)
    if "cuda_ipc" in step:
        call.until("progress")
        print("midway", flush=True)
        time.sleep(600)


UpdateCall.send = send_and_stay
cuda_ipc._MOST_BUCKET_BYTES = cuda_ipc._LEAST_BUCKET_BYTES = 131_072
weights = {name: Tensor.of(tensor.bits, "bfloat16", expandable=True) for name, tensor in other_weights("qwen3").items()}
Rollout(sys.argv[1]).push_weights(weights, mode=sys.argv[2])
