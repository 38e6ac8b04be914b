"""Status and control replies of the sidecar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _wire as wire
from .generation import TopLogprobs, float32, int32

EngineState = Literal["loading", "running", "pausing", "paused", "updating", "sleeping", "poisoned", "faulted"]
"""updating: in place, no step runs. poisoned: only a full update ends this. faulted: restart the sidecar. A state that is newer than this
client reads "unknown_<number>"."""

PauseMode = Literal["abort", "wait", "keep"]
"""abort: end all groups, returning their partial tokens. wait: let running groups end first; new ones wait. keep: freeze between two steps;
samples continue at resume."""

MemoryTag = Literal["weights", "kv_cache"]
"""weights: with the staging set; after waking only a full push makes the engine serve. kv_cache: with all cached prefixes."""


@dataclass(frozen=True)
class Status:
    """What the sidecar is doing. Counters grow from its start."""

    state: EngineState
    reason: str
    """Why the engine is faulted or poisoned, the owner of a pause or update, what sleeps; otherwise empty."""

    version: int
    """Of the weights being served."""

    model: str
    backend: str
    running: int
    """Samples with a seat in the batch."""

    waiting: int
    """Samples waiting for a seat."""

    kv_blocks_total: int
    kv_blocks_used: int
    """Held by samples."""

    kv_blocks_cached: int
    """Free, but still holding a reusable prefix."""

    steps: int
    generated_tokens: int
    prefilled_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    updating: bool
    """An update, staged or in place, by ``update_owner`` is in progress."""

    update_owner: str
    vocab_size: int
    max_context: int
    """Tokens of one sample, prompt included."""

    asleep: tuple[MemoryTag, ...]
    memory: MemoryInUse

    @staticmethod
    def from_wire(reply: Any) -> Status:
        plain = {name: getattr(reply, name) for name in Status.__dataclass_fields__ if name not in ("state", "asleep", "memory")}
        return Status(state=state(reply), asleep=tags(reply.asleep), memory=MemoryInUse.from_wire(reply.memory), **plain)


@dataclass(frozen=True)
class MemoryInUse:
    """Bytes of the sidecar's device, by what they are used for. What sleeps takes none."""

    weights: int
    staging: int
    """A second set of weights, from the first staged push on."""

    kv_cache: int
    graphs: int
    """A GPU's: by how much all memory in use grew while graphs were captured."""

    nccl: int
    """Likewise, while ranks connected."""

    free: int
    """Whoever uses the rest."""

    @staticmethod
    def from_wire(memory: Any) -> MemoryInUse:
        return MemoryInUse(**{name: getattr(memory, name) for name in MemoryInUse.__dataclass_fields__})


@dataclass(frozen=True)
class Score:
    """Log-probabilities of given tokens."""

    ids: NDArray[np.int32]
    """The tokens scored."""

    logprobs: NDArray[np.float32]
    """Model log-probability of ids[1:], each given the tokens before it: one less than ids."""

    top: TopLogprobs | None
    """Alternatives for every position after the first and, in the last row, for the next token: one row per id. None unless
    requested."""

    version: int
    """Version of the weights that scored."""

    @staticmethod
    def from_wire(reply: Any) -> Score:
        return Score(int32(reply.ids), float32(reply.logprobs), TopLogprobs.from_wire(reply.top), reply.version)


@dataclass(frozen=True)
class Aborted:
    """Groups and samples that an abort has ended."""

    groups: int
    samples: int
    unknown: tuple[str, ...]
    """Ids that are not in flight."""


@dataclass(frozen=True)
class FreedMemory:
    """Memory that one tag has given back."""

    allocated_bytes: int
    """Address space."""

    freed_bytes: int
    """How much the memory in use fell: a GPU's, or the process's resident memory; less than allocated where pages had never been
    touched."""

    free_bytes_before: int
    """Free on the GPU as its driver says, or on the machine."""

    free_bytes_after: int
    host_bytes: int
    """Held by the host meanwhile, for weights that are kept."""

    @staticmethod
    def from_wire(freed: Any) -> FreedMemory:
        return FreedMemory(**{name: getattr(freed, name) for name in FreedMemory.__dataclass_fields__})


@dataclass(frozen=True)
class Slept:
    """Memory that a sleep has freed."""

    state: EngineState
    freed: Mapping[MemoryTag, FreedMemory]
    """One entry for each tag that was awake before."""

    asleep: tuple[MemoryTag, ...]


@dataclass(frozen=True)
class DescribedTensor:
    """One tensor of the weights being served."""

    dtype: str
    """As stored by the engine: "BF16", "F16" or "F32". Other types are converted."""

    shape: tuple[int, ...]
    digest: str
    """Of the whole tensor's bytes in the type that it was last sent in (DEFINITIONS.md), 32 hexadecimal digits; empty where none is known:
    after single elements were pushed of a tensor that the sidecar stores in another precision."""


@dataclass(frozen=True)
class WeightsDescription:
    """The weights being served."""

    version: int
    tensors: Mapping[str, DescribedTensor]
    """By their names in the Hugging Face checkpoint."""

    digest_algorithm: str
    """How the sidecar computes digests; this client knows "xxh3-128-tree-131072" (DEFINITIONS.md). Empty: a sidecar older than the
    name."""

    @staticmethod
    def from_wire(reply: Any) -> WeightsDescription:
        return WeightsDescription(reply.version, {
            tensor.name: DescribedTensor(wire.TENSOR_DTYPE.name(tensor.dtype).upper(), tuple(tensor.shape), tensor.digest.hex())
            for tensor in reply.tensors
        }, reply.digest_algorithm)


def state(reply: Any) -> EngineState:
    return wire.ENGINE_STATE.name(reply.state)  # type: ignore[return-value]


def tags(values: Any) -> tuple[MemoryTag, ...]:
    return tuple(wire.MEMORY_TAG.name(value) for value in values)  # type: ignore[misc]
