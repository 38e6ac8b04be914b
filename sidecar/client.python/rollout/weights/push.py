"""One push, from preflight to commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from .. import _wire as wire
from ..control import Status, WeightsDescription
from ..errors import RolloutError, UpdateOutcome, WeightDigestError, WeightUpdateFailed, WeightUpdateRejected, from_rpc, from_status
from .call import StreamEnded, UpdateCall
from .digest import ALGORITHM, combine
from .layout import PayloadLayout
from .payload import Payload
from .shards import OtherRankError, ShardGroup
from .senders import Mode, Sender, Transport
from .tensors import TensorSource

_RESOLVE_POLL = 0.1
_MAX_DEADLINE = (1 << 32) - 1


@dataclass
class PushTimings:
    """Durations of a push, in seconds. The first four add up to about ``total``. Those measured by the sidecar are 0 in a push that is
    confirmed by its status."""

    preflight: float = 0.0
    """Until the sidecar has accepted the manifest."""

    write: float = 0.0
    """Copying tensors out of the trainer, hashing and writing or sending them."""

    transfer: float = 0.0
    """Waiting for the sidecar to have read what was written or sent."""

    commit: float = 0.0
    """From commit to the sidecar's answer that the new weights are served."""

    total: float = 0.0
    server_transfer: float = 0.0
    """From ready to the last byte."""

    server_swap: float = 0.0
    """From commit to the step boundary where the new weights took over."""

    server_stall: float = 0.0
    """How long no step could run."""


@dataclass(frozen=True)
class PushResult:
    """The new version is served."""

    version: int
    digest: str
    """XXH3-128 over the digests of the tensors in their order, 32 hexadecimal digits; empty where not known."""

    payload_bytes: int
    mode: Mode
    transport: Transport
    reason: str
    """Why that transport, in words."""

    timings: PushTimings
    confirmed_by_status: bool = False
    """The answer to the commit was lost; the status showed afterwards that it had been carried out."""


@dataclass
class WeightPush:
    """Used once."""

    calls: wire.Calls
    layout: PayloadLayout
    tensors: Sequence[TensorSource]
    begin: Any
    """BeginUpdate, without the manifest, the payload's size and the deadline."""

    sender: Callable[[Any], Sender]
    """Chooses the way for the payload, once the sidecar has answered Ready."""

    hashed: bool
    """Bytes that pass through the host's memory."""

    timeout: float
    resolve_within: float
    shards: ShardGroup | None = None
    parts: Sequence[tuple[list[bytes], int]] = ()
    """What ``part`` returned on every rank of ``shards``."""

    _mode: Mode = "staged"
    _timings: PushTimings = field(default_factory=PushTimings)
    _agreed: bool = False
    _commit_sent: bool = False
    _digest: bytes = b""

    def part(self) -> tuple[list[bytes], int]:
        """The manifest of what this process sends, and its length."""
        return [entry.SerializeToString() for entry in self.layout.manifest], self.layout.payload_bytes

    def run(self) -> PushResult:
        self._payload = Payload(self.layout, self.tensors, self.hashed)
        self._started = self._lapped = time.monotonic()
        self.begin.deadline_milliseconds = max(1, min(round(self.timeout * 1000), _MAX_DEADLINE))
        call = UpdateCall(self.calls, self.timeout)
        try:
            return self._run(call)
        except StreamEnded as end:
            if not self._agreed:
                raise from_status(end.code, end.detail) from end.cause
            # Only the sidecar knows whether a commit was carried out, or whether weights were overwritten.
            undecided = self._commit_sent or call.payload_sent and self._mode == "in_place"
            outcome = self._resolve() if undecided else UpdateOutcome.NOT_COMMITTED
            if isinstance(outcome, WeightsDescription):
                return self._confirmed(outcome)
            raise self._broken(end, outcome) from end.cause
        except (WeightUpdateRejected, WeightUpdateFailed):
            raise
        except BaseException as error:
            if not self._commit_sent:
                call.abort(f"{type(error).__name__}: {error}")
            raise
        finally:
            call.close()

    def _run(self, call: UpdateCall) -> PushResult:
        # :: Step 1: the sidecar accepts the manifest, before a byte is sent.
        ready = self._open(call) if self.shards is None else self._open_part(call, self.shards)
        self._agreed = True
        self._mode = self._checked_mode(ready)
        self._timings.preflight = self._lap()

        # :: Step 2: the bytes leave the trainer.
        # :: Step 3: wait until the sidecar has read them. That keeps the commit, during which an answer may be lost, short.
        if self.shards is None:
            self._send(call, ready)
            self._digest = self._payload.digest()
        else:
            self._digest = self._send_part(call, ready, self.shards)

        # :: Step 4: commit, if it has received what we sent.
        self._commit_sent = True
        if self.shards is None or self.shards.rank == 0:
            call.send(commit=wire.Commit(digest=self._digest))
        committed = call.until("committed")
        self._check_digest(committed.version, committed.digest)
        self._timings.server_transfer = committed.timings.transfer_seconds
        self._timings.server_swap = committed.timings.swap_seconds
        self._timings.server_stall = committed.timings.stall_seconds
        return self._result(committed.digest)

    def _open(self, call: UpdateCall) -> Any:
        self.begin.manifest.extend(self.layout.manifest)
        self.begin.payload_bytes = self.layout.payload_bytes
        call.send(begin=self.begin)
        return call.until("ready")

    def _open_part(self, call: UpdateCall, shards: ShardGroup) -> Any:
        """Rank 0 begins with the manifests of all ranks; the others join its update."""
        ready: Any = None

        def begin() -> tuple[bytes, int, int] | None:
            nonlocal ready
            if shards.rank > 0:
                return None
            for part, (manifest, _) in enumerate(self.parts):
                for entry in manifest:
                    self.begin.manifest.add().MergeFromString(entry)
                    self.begin.manifest[-1].part = part
            self.begin.payload_bytes = self.parts[0][1]
            self.begin.joined_payload_bytes.extend(size for _, size in self.parts[1:])
            call.send(begin=self.begin)
            ready = call.until("ready")
            if len(self.parts) > 1 and not ready.update_id:
                raise RolloutError("the sidecar is older than this client: it takes no parts of several ranks")
            return bytes(ready.update_id), self.begin.base_version, self.begin.new_version

        opened = shards.all(begin)[0]
        if ready is None and opened is not None:
            update_id, self.begin.base_version, self.begin.new_version = opened
            call.send(join=wire.JoinUpdate(update_id=update_id, part=shards.rank, segment_bytes=self.begin.segment_bytes))
            ready = call.until("ready")
        return ready

    def _send(self, call: UpdateCall, ready: Any) -> None:
        self._chosen = self.sender(ready)
        end = self._chosen.send(call, self._payload, self._mode)
        self._timings.write = self._lap()
        call.received(end)
        self._timings.transfer = self._lap()

    def _send_part(self, call: UpdateCall, ready: Any, shards: ShardGroup) -> bytes:
        """The digest of all parts; empty where a rank hashed nothing."""

        def send() -> list[bytes] | None:
            self._send(call, ready)
            return self._payload.digests if self._payload.digests or not self.tensors else None

        try:
            digests = shards.all(send)
        except OtherRankError as error:
            call.abort(str(error))
            call.until("committed")  # raises what the sidecar says became of the update
            raise
        return b"" if any(part is None for part in digests) else combine(digest for part in digests for digest in part or ())

    def _checked_mode(self, ready: Any) -> Mode:
        asked = wire.UPDATE_MODE.name(self.begin.mode) if self.begin.mode else "auto"
        given = wire.UPDATE_MODE.name(ready.mode) if ready.mode else "staged"  # an older sidecar does not report it and only stages
        if asked not in ("auto", given):
            raise RolloutError(f"the sidecar would update {given}, not {asked}: it is older than this client")
        return given  # type: ignore[return-value]

    def _resolve(self) -> UpdateOutcome | WeightsDescription:
        """Asks the sidecar for the outcome of the push. Returns the weights it serves if they are the new version, else the outcome."""
        until = time.monotonic() + self.resolve_within
        while (left := until - time.monotonic()) > 0:
            try:
                status = Status.from_wire(self.calls.status(wire.StatusRequest(), timeout=left))
                if status.state == "poisoned":
                    return UpdateOutcome.POISONED
                if status.version == self.begin.new_version and self._commit_sent:
                    described = self.calls.describe(wire.DescribeRequest(), timeout=max(0.001, until - time.monotonic()))
                    if described.version == self.begin.new_version:
                        return WeightsDescription.from_wire(described)
                    return UpdateOutcome.UNKNOWN  # replaced meanwhile: it is not known any more whether it was ours
                if status.version != self.begin.base_version:
                    return UpdateOutcome.UNKNOWN  # another trainer has pushed since, over ours or over the old one
                if not status.updating:
                    return UpdateOutcome.NOT_COMMITTED
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise from_rpc(error) from error
                # It may be restarting, or only the connection is lost.
            except ValueError:
                return UpdateOutcome.UNKNOWN  # gRPC's error for a client that was closed meanwhile
            time.sleep(_RESOLVE_POLL)
        return UpdateOutcome.UNKNOWN

    def _confirmed(self, served: WeightsDescription) -> PushResult:
        # The same number may be another trainer's update; the digests distinguish them. Those of tensors that were sent in part cannot be
        # compared: the sidecar describes whole tensors.
        known = [served.tensors[tensor.name].digest if tensor.name in served.tensors else "" for tensor in self.tensors]
        in_part = any(tensor.sparse_count is not None or tensor.rows is not None for tensor in self.tensors)
        received = b"" if in_part else combine(bytes.fromhex(digest) for digest in known)
        if received and self._digest and served.digest_algorithm != ALGORITHM:
            raise WeightUpdateFailed(
                f"version {served.version} is served, but whether it is this push is not known: the sidecar computes digests as "
                f"'{served.digest_algorithm}', this client as '{ALGORITHM}'", UpdateOutcome.UNKNOWN)
        if received:
            self._check_digest(served.version, received)
        return self._result(received, confirmed_by_status=True)

    def _check_digest(self, version: int, received: bytes) -> None:
        sent = self._digest
        if sent and sent != received:
            raise WeightDigestError(version, sent.hex(), received.hex())

    def _result(self, digest: bytes, *, confirmed_by_status: bool = False) -> PushResult:
        self._timings.commit = self._lap()
        self._timings.total = time.monotonic() - self._started
        return PushResult(
            self.begin.new_version, digest.hex(), self.layout.payload_bytes, self._mode, self._chosen.transport, self._chosen.reason,
            self._timings, confirmed_by_status)

    def _broken(self, end: StreamEnded, outcome: UpdateOutcome) -> WeightUpdateFailed:
        what = {
            grpc.StatusCode.DEADLINE_EXCEEDED: f"it took longer than its timeout of {self.timeout:g} s",
        }.get(end.code, f"{end.code.name}, {end.detail}")
        served = {
            UpdateOutcome.NOT_COMMITTED: f"nothing has replaced version {self.begin.base_version}",
            UpdateOutcome.POISONED: "the weights in service are lost: push a full update",
        }.get(outcome, f"the sidecar did not say within {self.resolve_within:g} s whether version {self.begin.new_version} is served")
        return WeightUpdateFailed(
            f"the update to version {self.begin.new_version} broke off: {what}; {served}", outcome, code=end.code)

    def _lap(self) -> float:
        now = time.monotonic()
        lap = now - self._lapped
        self._lapped = now
        return lap

