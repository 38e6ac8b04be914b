"""The stream of one update."""

from __future__ import annotations

import queue
import threading
from typing import Any

import grpc

from .. import _wire as wire
from ..errors import Problem, UpdateOutcome, WeightUpdateFailed, WeightUpdateRejected

_ABORT_WITHIN = 1.0
_POLL = 0.05
_PAYLOAD = {"chunk", "shared_memory", "file", "cuda_ipc", "nccl"}


class StreamEnded(Exception):
    """The stream ended without the sidecar's answer how the update ended."""

    def __init__(self, cause: grpc.RpcError | None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE if cause is None else cause.code()
        self.detail: str = "the sidecar ended the update without an answer" if cause is None else cause.details() or ""


class UpdateCall:
    """The stream of one update. Replies are also read while sending, so that an update the sidecar ends is noticed at once."""

    payload_sent = False
    """Whether the sidecar may have got a payload message: in place, the first one ends what was served."""

    def __init__(self, calls: wire.Calls, timeout: float) -> None:
        self._requests: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._received = 0
        self._stream = calls.update(iter(self._requests.get, None), timeout=timeout)
        threading.Thread(target=self._read, name="rollout-update", daemon=True).start()

    def send(self, **step: Any) -> None:
        """Sends a step, after waiting until the one before has been sent. Raises what ``next`` raises where the call has ended."""
        request = wire.UpdateRequest(**step)
        self.payload_sent |= not _PAYLOAD.isdisjoint(step)
        while True:
            self.raise_if_ended()
            try:
                return self._requests.put(request, timeout=_POLL)
            except queue.Full:
                continue

    def raise_if_ended(self) -> None:
        """The sidecar has ended the update or the connection is lost: sending more is useless."""
        while self._ended.is_set():
            self.next()

    def wait_for_end(self, seconds: float) -> None:
        """Returns when the call has ended, or the time has passed."""
        self._ended.wait(seconds)

    def next(self) -> Any:
        """The next reply that is not an error.

        Raises:
            WeightUpdateRejected, WeightUpdateFailed: The sidecar ended the update, for the reason in the message.
            StreamEnded: The connection or the call failed.
        """
        reply = self._replies.get()
        if isinstance(reply, StreamEnded):
            self._replies.put(reply)
            raise reply
        step = reply.WhichOneof("step")
        if step == "rejected":
            raise WeightUpdateRejected([Problem(problem.field, problem.message) for problem in reply.rejected.problems])
        if step in ("failed", "aborted"):
            end = getattr(reply, step)
            outcome = UpdateOutcome.POISONED if end.poisoned else UpdateOutcome.NOT_COMMITTED
            served = "the weights in service are lost" if end.poisoned else "the old weights are still served"
            raise WeightUpdateFailed(f"the update {'failed' if step == 'failed' else 'was aborted'}, {served}: {end.reason}", outcome)
        return reply

    def until(self, step: str) -> Any:
        """The next reply of this kind, skipping others."""
        while True:
            reply = self.next()
            if reply.WhichOneof("step") == step:
                return getattr(reply, step)

    def received(self, payload_bytes: int) -> None:
        """Returns when the sidecar has read this much of the payload."""
        while self._received < payload_bytes:
            self._received = self.until("progress").payload_bytes

    def abort(self, reason: str) -> None:
        """Sends the sidecar the reason, for its log, if it is still connected. Closing the stream alone would end the update too."""
        try:
            self._requests.put(wire.UpdateRequest(abort=wire.AbortUpdate(reason=reason)), timeout=_ABORT_WITHIN)
            self._ended.wait(_ABORT_WITHIN)
        except queue.Full:
            pass  # it hangs; it will see the stream break

    def close(self) -> None:
        """Ends the call where it has not ended."""
        self._stream.cancel()
        self._ended.wait()
        # gRPC's sending thread waits for a request; give it the end.
        while True:
            try:
                return self._requests.put_nowait(None)
            except queue.Full:
                try:
                    self._requests.get_nowait()
                except queue.Empty:
                    continue

    def _read(self) -> None:
        cause = None
        try:
            for reply in self._stream:
                self._replies.put(reply)
        except grpc.RpcError as error:
            cause = error
        self._replies.put(StreamEnded(cause))
        self._ended.set()
