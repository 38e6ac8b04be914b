"""The messages and calls of ``rollout.v1``, built at import from the descriptors in ``rollout.binpb``.

Built and not generated: code from protoc works with one generation of the protobuf runtime, descriptors with all of them (3.21 and later).
``sidecar/client.python/regenerate`` writes the file from protos/; a test fails when the two differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any, Protocol

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# A separate pool, because another library in the process may register rollout.v1 too.
_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(resources.files(__name__).joinpath("rollout.binpb").read_bytes()).file:
    _pool.AddSerializedFile(_file.SerializeToString())


def _message(name: str) -> Any:
    descriptor = _pool.FindMessageTypeByName(f"rollout.v1.{name}")
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(_pool).GetPrototype(descriptor)  # before protobuf 4.22


def filled(message: Any, **fields: Any) -> Any:
    """A message with these fields. Raises ValueError or TypeError naming the field, which protobuf's own errors do not."""
    made = message()
    for name, value in fields.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if isinstance(value, dict) and field.message_type is not None and not field.message_type.GetOptions().map_entry:
            getattr(made, name).CopyFrom(filled(getattr(made, name).__class__, **value))
            continue
        try:
            made.MergeFrom(message(**{name: value}))
        except (TypeError, ValueError) as e:
            raise type(e)(f"{name}: {e}") from None
    return made


class Enum:
    """An enum of the wire under the names that callers use: ``ENGINE_STATE_RUNNING`` is ``"running"``."""

    def __init__(self, name: str, prefix: str) -> None:
        values = _pool.FindEnumTypeByName(f"rollout.v1.{name}").values
        self._names: Mapping[int, str] = {value.number: value.name.removeprefix(prefix).lower() for value in values if value.number}
        self._numbers: Mapping[str, int] = {name: number for number, name in self._names.items()}

    def name(self, number: int) -> str:
        """The name of a value; ``"unknown_7"`` for one that is newer than this client."""
        return self._names.get(number, f"unknown_{number}")

    def number(self, name: str, argument: str) -> int:
        """Raises ValueError naming the argument and its valid values."""
        if name not in self._numbers:
            raise ValueError(f"{argument}={name!r}: expected one of {', '.join(map(repr, self._numbers))}")
        return self._numbers[name]


FINISH_REASON = Enum("FinishReason", "FINISH_REASON_")
ENGINE_STATE = Enum("EngineState", "ENGINE_STATE_")
PAUSE_MODE = Enum("PauseMode", "PAUSE_MODE_")
MEMORY_TAG = Enum("MemoryTag", "MEMORY_TAG_")
TENSOR_DTYPE = Enum("TensorDType", "TENSOR_DTYPE_")
UPDATE_POLICY = Enum("UpdatePolicy", "UPDATE_POLICY_")
UPDATE_MODE = Enum("UpdateMode", "UPDATE_MODE_")
CUDA_HANDLE_KIND = Enum("CudaHandleKind", "CUDA_HANDLE_KIND_")

TokenIds = _message("TokenIds")
GenerateRequest = _message("GenerateRequest")
GenerateReply = _message("GenerateReply")
ScoreRequest = _message("ScoreRequest")
ScoreReply = _message("ScoreReply")
AbortRequest = _message("AbortRequest")
AbortReply = _message("AbortReply")
RequestIds = _message("RequestIds")

StatusRequest = _message("StatusRequest")
StatusReply = _message("StatusReply")
PauseRequest = _message("PauseRequest")
PauseReply = _message("PauseReply")
ResumeRequest = _message("ResumeRequest")
ResumeReply = _message("ResumeReply")
SleepRequest = _message("SleepRequest")
SleepReply = _message("SleepReply")
WakeUpRequest = _message("WakeUpRequest")
WakeUpReply = _message("WakeUpReply")

DescribeRequest = _message("DescribeRequest")
DescribeReply = _message("DescribeReply")
UpdateRequest = _message("UpdateRequest")
UpdateReply = _message("UpdateReply")
BeginUpdate = _message("BeginUpdate")
ManifestTensor = _message("ManifestTensor")
Chunk = _message("Chunk")
SharedMemory = _message("SharedMemory")
CheckpointFile = _message("CheckpointFile")
JoinUpdate = _message("JoinUpdate")
CudaIpc = _message("CudaIpc")
CudaAllocation = _message("CudaAllocation")
CudaRange = _message("CudaRange")
Nccl = _message("Nccl")
NcclBucket = _message("NcclBucket")
Commit = _message("Commit")
AbortUpdate = _message("AbortUpdate")
ReleaseMemoryRequest = _message("ReleaseMemoryRequest")
ReleaseMemoryReply = _message("ReleaseMemoryReply")


class UnaryCall(Protocol):
    """One request, one reply."""

    def __call__(self, request: Any, *, timeout: float | None) -> Any: ...


class ReplyStream(Protocol):
    """The replies of a call in progress."""

    def __iter__(self) -> Iterator[Any]: ...
    def cancel(self) -> bool: ...


class StreamCall(Protocol):
    """A stream of requests and a stream of replies."""

    def __call__(self, requests: Iterable[Any], *, timeout: float | None) -> ReplyStream: ...


class Calls:
    """The calls of a sidecar."""

    def __init__(self, channel: grpc.Channel) -> None:
        def unary(method: str, request: Any, reply: Any) -> UnaryCall:
            call: UnaryCall = channel.unary_unary(f"/rollout.v1.{method}", request.SerializeToString, reply.FromString)
            return call

        def stream(method: str, request: Any, reply: Any) -> StreamCall:
            call: StreamCall = channel.stream_stream(f"/rollout.v1.{method}", request.SerializeToString, reply.FromString)
            return call

        self.generate_batch = stream("RolloutService/GenerateBatch", GenerateRequest, GenerateReply)
        self.score = unary("RolloutService/Score", ScoreRequest, ScoreReply)
        self.abort = unary("RolloutService/Abort", AbortRequest, AbortReply)
        self.status = unary("ControlService/Status", StatusRequest, StatusReply)
        self.pause = unary("ControlService/Pause", PauseRequest, PauseReply)
        self.resume = unary("ControlService/Resume", ResumeRequest, ResumeReply)
        self.sleep = unary("ControlService/Sleep", SleepRequest, SleepReply)
        self.wake_up = unary("ControlService/WakeUp", WakeUpRequest, WakeUpReply)
        self.describe = unary("WeightsService/Describe", DescribeRequest, DescribeReply)
        self.release_memory = unary("WeightsService/ReleaseMemory", ReleaseMemoryRequest, ReleaseMemoryReply)
        self.update = stream("WeightsService/Update", UpdateRequest, UpdateReply)
