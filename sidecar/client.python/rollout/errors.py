"""Errors, with a class for each kind that a caller may want to distinguish. All of them are RolloutErrors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from .generation import Sample


class RolloutError(Exception):
    """A call to the sidecar failed.

    Attributes:
        code: gRPC's status; None where the client itself detected the error.
        request_id: The group the error is about, or "".
    """

    def __init__(self, message: str, *, code: grpc.StatusCode | None = None, request_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


class RequestError(RolloutError):
    """The request is invalid; sending it again cannot succeed.

    Attributes:
        problems: Everything wrong with it, as the sidecar's text: "field: message; field: message".
    """

    def __init__(self, message: str, *, problems: str, code: grpc.StatusCode | None = None, request_id: str = "") -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.problems = problems


class BusyError(RolloutError):
    """The sidecar has no room now; the same request may be accepted later."""


class StateError(RolloutError):
    """The call is not allowed in the state the engine is in; the message names the state."""


class UnavailableError(RolloutError, ConnectionError):
    """The sidecar cannot be reached, went away during the call, or its engine has failed and must be restarted."""


class RolloutTimeoutError(RolloutError, TimeoutError):
    """The call took longer than its timeout; the sidecar drops its samples or update."""


class BatchError(RolloutError):
    """Some groups of a batch were refused; the others have been sampled.

    Attributes:
        refused: One error for each refused group; its ``request_id`` says which.
        groups: What ``generate`` would have returned, with None for a refused group.
    """

    _SHOWN = 5

    def __init__(self, refused: Sequence[RolloutError], groups: Sequence[list[Sample] | None]) -> None:
        shown = [str(error) for error in refused[: self._SHOWN]]
        if len(refused) > self._SHOWN:
            shown.append(f"and {len(refused) - self._SHOWN} more")
        super().__init__("\n".join([f"{len(refused)} group(s) of the batch were refused:", *shown]), code=refused[0].code)
        self.refused = list(refused)
        self.groups = list(groups)


class UpdateOutcome(Enum):
    """Which weights are served after an update that did not succeed."""

    NOT_COMMITTED = "not committed"
    """The old weights are still served; nothing of the update is left behind."""

    COMMITTED = "committed"
    """The new version is served."""

    UNKNOWN = "unknown"
    """The sidecar did not answer. ``Rollout.status`` tells once it answers again."""

    POISONED = "poisoned"
    """None: the update was interrupted while it was overwriting the weights in place. Push a full update; until then nothing is sampled."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an update's manifest or versions."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class WeightUpdateRejected(RolloutError):
    """The preflight found problems; no byte was sent and the old weights are still served.

    Attributes:
        problems: All problems that were found.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(f"the update was rejected: {'; '.join(map(str, problems))}")
        self.problems = list(problems)


class WeightUpdateFailed(RolloutError):
    """An update that had begun did not succeed.

    Attributes:
        outcome: Which weights are served now.
    """

    def __init__(self, message: str, outcome: UpdateOutcome, *, code: grpc.StatusCode | None = None) -> None:
        super().__init__(message, code=code)
        self.outcome = outcome


class WeightDigestError(WeightUpdateFailed):
    """The sidecar serves the new version, but what it received is not what was sent.

    Push again: samples drawn from this version cannot be trusted.

    Attributes:
        version: Now served.
        sent: Digest, 32 hexadecimal digits.
        received: Digest, 32 hexadecimal digits.
    """

    def __init__(self, version: int, sent: str, received: str) -> None:
        super().__init__(
            f"version {version} was committed with digest {received}, but the digest of what was sent is {sent}",
            UpdateOutcome.COMMITTED,
        )
        self.version = version
        self.sent = sent
        self.received = received


class PayloadFileError(RolloutError, OSError):
    """The folder of a push has no room for the payload, or no file can be made there."""


class SharedMemoryError(PayloadFileError):
    """As PayloadFileError, for /dev/shm."""


class CudaError(RolloutError):
    """A call of the CUDA driver or of NCCL failed in this process, or the library is missing."""


class SidecarError(RolloutError):
    """The sidecar's process could not be started, or ended before it was ready.

    Attributes:
        exit_code: None where it never ran or this client stopped it.
        last_lines: The last lines it printed.
    """

    def __init__(self, message: str, *, exit_code: int | None = None, last_lines: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *(f"  | {line}" for line in last_lines)]))
        self.exit_code = exit_code
        self.last_lines = list(last_lines)


def from_status(code: grpc.StatusCode, detail: str, request_id: str = "") -> RolloutError:
    """The error for a gRPC status."""
    about = f"request {request_id!r}: {detail}" if request_id else detail
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.ALREADY_EXISTS:
            return RequestError(about, problems=detail, code=code, request_id=request_id)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return BusyError(about, code=code, request_id=request_id)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return StateError(about, code=code, request_id=request_id)
        case grpc.StatusCode.UNAVAILABLE:
            return UnavailableError(about, code=code, request_id=request_id)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return RolloutTimeoutError("the call took longer than its timeout", code=code, request_id=request_id)
        case _:
            return RolloutError(f"{code.name}: {about}", code=code, request_id=request_id)


def from_rpc(error: grpc.RpcError) -> RolloutError:
    """The error for a call that gRPC says has failed."""
    return from_status(error.code(), error.details() or "")
