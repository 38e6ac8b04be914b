"""One rank of a trainer that pushes slices of its weights together with others: run by test_shards.

rank_trainer.py SIDECAR EXCHANGE RANK RANKS VERSIONS WHAT; prints how every push ended.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Client

import numpy as np
from support import other_weights

from rollout import BFloat16, Rollout, ShardGroup, TensorSlice
from rollout.weights.call import UpdateCall

address, exchange_at, rank, ranks, versions, what = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), sys.argv[6]
connection = Client(exchange_at, "AF_UNIX")
connection.send(rank)


def exchange(own):
    connection.send(own)
    return connection.recv()


def slices(name, tensor):
    rows = len(tensor.bits)
    if name.endswith("norm.weight"):
        return tensor  # every rank has it
    first, end = rows * rank // ranks, rows * (rank + 1) // ranks
    return TensorSlice(tensor.bits.shape, first, BFloat16(tensor.bits[first:end])) if end > first else None


weights = {name: piece for name, tensor in other_weights("qwen3").items() if (piece := slices(name, tensor)) is not None}
if rank == ranks - 1:
    if what == "refused":
        weights["model.embed_tokens.weight"] = np.zeros(3, np.int64)
    elif what == "forgets":
        del weights["model.embed_tokens.weight"]
    elif what == "has nothing":
        weights = {}
    elif what.startswith("stops"):
        send = UpdateCall.send

        def send_and_stay(call: UpdateCall, **step: object) -> None:
            send(call, **step)
            if "chunk" in step or "shared_memory" in step:
                call.until("progress")
                print("midway", flush=True)
                time.sleep(600)

        UpdateCall.send = send_and_stay
if what == "has nothing" and rank == ranks - 2:
    last = {name: tensor for name, tensor in other_weights("qwen3").items() if name in weights and not name.endswith("norm.weight")}
    weights = {
        name: TensorSlice(last[name].bits.shape, piece.first_row, BFloat16(last[name].bits[piece.first_row:])) if name in last else piece
        for name, piece in weights.items()
    }
with Rollout(address) as client:
    for version in range(1, versions + 1):
        try:
            result = client.push_weights(
                weights, mode="in_place" if what == "stops in place" else "staged",
                transport=("auto", "inline", "shared_memory")[(rank + version) % 3], timeout=60,
                shards=ShardGroup(rank, ranks, exchange))
            print("committed", result.version, result.digest, result.transport, flush=True)
        except BaseException as error:
            print(type(error).__name__, getattr(getattr(error, "outcome", None), "name", None), str(error).replace("\n", " "), flush=True)
            break
