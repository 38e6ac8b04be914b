"""Client of a Rollout sidecar: samples, log-probabilities and weight updates for RL post-training.

    from rollout import Rollout

    with Rollout("unix:/tmp/rollout.sock") as rollout:
        groups = rollout.generate([[1, 2, 3]], n=8, max_tokens=64, seed=1)   # groups[0][i].ids, .logprobs, .versions
        ...                                                                 # learn
        rollout.push_weights(model)                                         # the next token is drawn from these
"""

from . import checkpoint
from .client import Rollout
from .control import Aborted, DescribedTensor, FreedMemory, MemoryInUse, Score, Slept, Status, WeightsDescription
from .errors import (
    BatchError,
    BusyError,
    CudaError,
    PayloadFileError,
    Problem,
    RequestError,
    RolloutError,
    RolloutTimeoutError,
    SharedMemoryError,
    SidecarError,
    StateError,
    UnavailableError,
    UpdateOutcome,
    WeightDigestError,
    WeightUpdateFailed,
    WeightUpdateRejected,
)
from .generation import PromptInfo, Sample, TopLogprobs, VersionSpan
from .sidecar import Sidecar
from .weights.push import PushResult, PushTimings
from .weights.shards import ShardGroup
from .weights.tensors import BFloat16, SparseTensor, TensorSlice

__all__ = [
    "Aborted",
    "BFloat16",
    "BatchError",
    "BusyError",
    "CudaError",
    "DescribedTensor",
    "FreedMemory",
    "MemoryInUse",
    "PayloadFileError",
    "Problem",
    "PromptInfo",
    "PushResult",
    "PushTimings",
    "RequestError",
    "Rollout",
    "RolloutError",
    "RolloutTimeoutError",
    "Sample",
    "Score",
    "ShardGroup",
    "SharedMemoryError",
    "Sidecar",
    "SidecarError",
    "Slept",
    "SparseTensor",
    "StateError",
    "Status",
    "TensorSlice",
    "TopLogprobs",
    "UnavailableError",
    "UpdateOutcome",
    "VersionSpan",
    "WeightDigestError",
    "WeightUpdateFailed",
    "WeightUpdateRejected",
    "WeightsDescription",
    "checkpoint",
]
