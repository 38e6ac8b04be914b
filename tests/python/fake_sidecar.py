"""A sidecar that answers what a test says: for what a real one does only when something has broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import support  # noqa: F401  puts the package on the path
from rollout import _wire as wire

Update = Callable[[Iterator[Any]], Iterator[Any]]


class FakeSidecar:
    """Listens on a Unix socket. Calls it was not told about are UNIMPLEMENTED."""

    def __init__(self, socket: str, update: Update | None = None, **replies: Any) -> None:
        self.address = f"unix:{socket}"
        self.requests: list[Any] = []
        self.replies = replies  # by method: status, describe, sleep, wake_up
        self._update = update
        self._server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[self])
        self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def service(self, call: Any) -> Any:
        methods = {
            "/rollout.v1.ControlService/Status": ("status", wire.StatusRequest),
            "/rollout.v1.ControlService/Sleep": ("sleep", wire.SleepRequest),
            "/rollout.v1.ControlService/WakeUp": ("wake_up", wire.WakeUpRequest),
            "/rollout.v1.WeightsService/Describe": ("describe", wire.DescribeRequest),
        }
        if call.method == "/rollout.v1.WeightsService/Update" and self._update is not None:
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, _: self._update(requests), wire.UpdateRequest.FromString, wire.UpdateReply.SerializeToString)
        name, request = methods.get(call.method, ("", None))
        if name not in self.replies:
            return None

        def answer(message: Any, _: Any) -> Any:
            self.requests.append(message)
            return self.replies[name]

        return grpc.unary_unary_rpc_method_handler(answer, request.FromString, lambda reply: reply.SerializeToString())
