"""A trainer whose weights are in the memory of the first GPU: a few steps of sampling, learning from what was sampled, and pushing. Prints
a line of JSON for each. Run by test_gpu_training."""

from __future__ import annotations

import argparse
import json

import numpy as np
from simulated_cuda import Memory, Tensor, rounded
from support import as_float32, golden_weights

from rollout import Rollout

parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("--transport")
parser.add_argument("--steps", type=int)
arguments = parser.parse_args()

# As PyTorch would have them: weights of two types, in one flat buffer and in allocations of their own, written where they are.
master = {name: as_float32(tensor) for name, tensor in golden_weights("qwen3").items()}
momentum = {name: np.zeros_like(values) for name, values in master.items()}
flat, used, weights = Memory(sum(values.nbytes + 512 for values in master.values())), 0, {}
for i, (name, values) in enumerate(master.items()):
    kind = "float32" if i % 3 == 0 else "bfloat16"
    content = values if kind == "float32" else rounded(values)
    weights[name] = Tensor.of(content, kind, flat, used) if i % 2 == 0 else Tensor.of(content, kind)
    used += -(-content.nbytes // 512) * 512 if i % 2 == 0 else 0

with Rollout(arguments.address) as client:
    served = client.status().version
    for step in range(arguments.steps):
        groups = client.generate([[1, 2, 3], [7, 8]], n=2, max_tokens=6, seed=step, ignore_eos=True)
        samples = [sample for group in groups for sample in group]
        # What is learned depends on every sampled token and the last bits of its log-probability.
        numbers = np.random.default_rng([token for sample in samples for token in sample.ids.tolist()])
        reward = np.float32(sum(sample.logprobs.sum() for sample in samples))
        for name, values in master.items():
            momentum[name] = momentum[name] * np.float32(0.9) + numbers.standard_normal(values.shape, np.float32) * reward
            values -= np.float32(1e-4) * momentum[name]
            tensor = weights[name]
            content = values if tensor.dtype == "torch.float32" else rounded(values)
            tensor.memory.write(content.tobytes(), tensor.data_ptr() - tensor.memory.pointer)
        pushed = client.push_weights(weights, transport=arguments.transport)
        print(json.dumps({
            "sampled": [sorted({span.version - served for span in sample.versions}) for sample in samples],
            "ids": [sample.ids.tolist() for sample in samples],
            "logprobs": [sample.logprobs.view(np.uint32).tolist() for sample in samples],
            "pushed": pushed.version - served, "transport": pushed.transport, "digest": pushed.digest,
        }), flush=True)
    [[last]] = client.generate([[5, 6]], max_tokens=6, temperature=0, ignore_eos=True)
    print(json.dumps({"ids": last.ids.tolist(), "logprobs": last.logprobs.view(np.uint32).tolist()}), flush=True)
