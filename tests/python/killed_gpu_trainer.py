"""A trainer whose first weights the sidecar has read on the GPU, or got by NCCL, and which stays there until it is killed: run by
test_cuda_ipc and test_nccl."""

from __future__ import annotations

import sys
import time

from simulated_cuda import Tensor
from support import other_weights

from rollout import Rollout
from rollout.weights import broadcast, cuda_ipc
from rollout.weights.call import UpdateCall

send, queue = UpdateCall.send, broadcast.Group.broadcast
broadcasts = 0


def stay() -> None:
    print("midway", flush=True)
    time.sleep(600)


def send_and_stay(call: UpdateCall, **step: object) -> None:
    send(call, **step)
    if "cuda_ipc" in step:
        call.until("progress")
        stay()


def broadcast_and_stay(group: broadcast.Group, *how: int) -> None:
    global broadcasts
    queue(group, *how)
    broadcasts += 1
    if broadcasts == 2:
        group.wait()
        stay()


UpdateCall.send = send_and_stay
broadcast.Group.broadcast = broadcast_and_stay
cuda_ipc._MOST_BUCKET_BYTES = cuda_ipc._LEAST_BUCKET_BYTES = broadcast._MOST_BUCKET_BYTES = 131_072
weights = {name: Tensor.of(tensor.bits, "bfloat16", expandable=True) for name, tensor in other_weights("qwen3").items()}
Rollout(sys.argv[1]).push_weights(weights, mode=sys.argv[2], transport=sys.argv[3])
