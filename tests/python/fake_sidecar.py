"""A sidecar whose answers a test determines, for behaviour that a real one shows only after a fault."""

from __future__ import annotations

import collections
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import support  # noqa: F401  puts the package on the path
from rollout import _wire as wire
from rollout.weights.digest import combine, xxhash

Stream = Callable[[Iterator[Any]], Iterator[Any]]
Hook = Callable[..., None]

_UNARY = {
    "Status": wire.StatusRequest, "Pause": wire.PauseRequest, "Resume": wire.ResumeRequest, "Sleep": wire.SleepRequest,
    "WakeUp": wire.WakeUpRequest, "Score": wire.ScoreRequest, "Abort": wire.AbortRequest, "Describe": wire.DescribeRequest,
}


def digest_of(tensor: bytes) -> bytes:
    """As DEFINITIONS.md defines it; empty without xxhash."""
    if xxhash is None:
        return b""
    return xxhash.xxh3_128_digest(b"".join(xxhash.xxh3_128_digest(tensor[at : at + 131072]) for at in range(0, len(tensor), 131072)))


class FakeSidecar:
    """Listens on a Unix socket. Calls it was not told about are UNIMPLEMENTED.

    Args:
        update, batch: The streams of weight updates and of generated samples.
        replies: By method: status, pause, resume, sleep, wake_up, score, abort, describe. A message, or what makes one.
    """

    def __init__(self, socket: str, update: Stream | None = None, batch: Stream | None = None, **replies: Any) -> None:
        self.address = f"unix:{socket}"
        self.requests: list[Any] = []
        self.replies = replies
        self.calls: collections.Counter[str] = collections.Counter()
        self.arrived: Hook | None = None  # called with the method's name and its context when a call has arrived
        self.done: Hook | None = None  # ... and when it has been handled, before it is answered
        self._streams = {
            "Update": (update, wire.UpdateRequest, wire.UpdateReply), "GenerateBatch": (batch, wire.GenerateRequest, wire.GenerateReply),
        }
        self._server = grpc.server(futures.ThreadPoolExecutor(24), handlers=[self])
        self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def service(self, call: Any) -> Any:
        method = call.method.rpartition("/")[2]
        if method in self._streams:
            stream, request, reply = self._streams[method]
            if stream is None:
                return None

            def answers(messages: Any, context: Any) -> Any:
                self._arrive(method, context)
                yield from stream(messages)

            return grpc.stream_stream_rpc_method_handler(answers, request.FromString, reply.SerializeToString)

        name = "wake_up" if method == "WakeUp" else method.lower()
        if name not in self.replies:
            return None

        def answer(message: Any, context: Any) -> Any:
            self._arrive(method, context)
            self.requests.append(message)
            reply = self.replies[name]
            made = reply() if callable(reply) else reply
            if self.done is not None:
                self.done(method, context)
            return made

        return grpc.unary_unary_rpc_method_handler(answer, _UNARY[method].FromString, lambda reply: reply.SerializeToString())

    def _arrive(self, method: str, context: Any) -> None:
        self.calls[method] += 1
        if self.arrived is not None:
            self.arrived(method, context)


class FakeWeights:
    """A minimal server side of the weight transaction: the served weights change at the commit, or in place."""

    def __init__(self, version: int = 7) -> None:
        self.version = version
        self.mode = 1
        self.digest_algorithm = "xxh3-128-tree-131072"
        self.poisoned = self.updating = False
        self.tensors: dict[str, bytes] = {}
        self.begun: list[Any] = []
        self.segment: Any = None  # lent with Ready
        self.behind = 0  # windows of shared memory that it leaves unread while more are to come
        self.windows: list[Any] = []
        self.device_uuid = b""
        self.read_device: Callable[[Any, int, int], bytes] | None = None  # of an allocation: offset, bytes
        self.ipc: list[Any] = []
        self.receive: Callable[[Any, bytearray], None] | None = None  # joins a group, and writes the message's buckets to the payload
        self.arrived: Hook | None = None  # called with the step's name and the request when a message has arrived
        self.done: Hook | None = None  # ... and when it has been handled, before it is answered
        self.says: Callable[[], Any] | None = None  # replaces the status reply

    def status(self) -> Any:
        return self.says() if self.says else wire.StatusReply(state=7 if self.poisoned else 2, version=self.version, updating=self.updating)

    def describe(self) -> Any:
        digests = {name: digest_of(content) for name, content in self.tensors.items()}
        return wire.DescribeReply(
            version=self.version, tensors=[{"name": name, "dtype": 1, "digest": d} for name, d in digests.items()],
            digest_algorithm=self.digest_algorithm)

    def update(self, requests: Iterator[Any]) -> Iterator[Any]:
        self.updating, in_place, begin, payload = True, False, None, bytearray()
        unread: list[Any] = []
        try:
            for request in requests:
                step = request.WhichOneof("step")
                if self.arrived is not None:
                    self.arrived(step, request)
                in_place |= self.mode == 2 and step != "begin"
                if step == "begin":
                    begin, payload = request.begin, bytearray(request.begin.payload_bytes)
                    self.begun.append(begin)
                    problem = {"field": "base_version", "message": f"{self.version} is served"}
                    fits = begin.base_version == self.version
                    lent = self.segment if begin.segment_bytes > 0 else None
                    reply = {"ready": {"mode": self.mode, "segment": lent, "device_uuid": self.device_uuid}} if fits else {"rejected": {"problems": [problem]}}
                elif step == "chunk":
                    payload[request.chunk.offset : request.chunk.offset + len(request.chunk.data)] = request.chunk.data
                    reply = {"progress": {"payload_bytes": request.chunk.offset + len(request.chunk.data)}}
                elif step == "shared_memory":
                    self.windows.append(request.shared_memory)
                    unread.append(request.shared_memory)
                    left = self.behind if _end(request.shared_memory) < len(payload) else 0
                    reply = {}
                    while len(unread) > left:
                        window = unread.pop(0)
                        content = Path(window.path).read_bytes()[window.offset : window.offset + window.bytes]
                        payload[window.payload_offset : _end(window)] = content
                        reply = {"progress": {"payload_bytes": _end(window)}}
                elif step == "cuda_ipc":
                    self.ipc.append(request.cuda_ipc)
                    unread.append(request.cuda_ipc)
                    reply = {}
                    left = 0 if _is_last(request.cuda_ipc, begin) else self.behind
                    while len(unread) > left:
                        message = unread.pop(0)
                        for part in message.ranges:
                            content = self.read_device(message.allocations[part.allocation], part.offset, part.bytes)
                            payload[part.payload_offset : _end(part)] = content
                        reply = {"progress": {"payload_bytes": _end(message.ranges[-1])}}
                elif step == "nccl":
                    reply = {}
                    if self.receive is not None:  # otherwise it never joins
                        self.receive(request.nccl, payload)
                        reply = {"progress": {"payload_bytes": _end(request.nccl.buckets[-1])}}
                elif step == "file":
                    content = Path(request.file.path).read_bytes()
                    payload[:] = content[8 + int.from_bytes(content[:8], "little") :]
                    reply = {"progress": {"payload_bytes": len(payload)}}
                elif step == "commit":
                    for tensor in begin.manifest:
                        size = {1: 2, 2: 2, 3: 4}[tensor.dtype]
                        if tensor.HasField("sparse_count"):
                            size = (4 + size) * tensor.sparse_count
                        else:
                            for dimension in tensor.shape:
                                size *= dimension
                        self.tensors[tensor.name] = bytes(payload[tensor.offset : tensor.offset + size])
                    self.version, self.poisoned, in_place = begin.new_version, False, False
                    digest = combine(digest_of(self.tensors[tensor.name]) for tensor in begin.manifest)
                    reply = {"committed": {"version": self.version, "digest": digest}}
                else:
                    reply = {"aborted": {"reason": request.abort.reason, "poisoned": in_place}}
                if self.done is not None:
                    self.done(step, request)
                if reply:
                    yield wire.UpdateReply(**reply)
                if reply and not reply.keys() & {"ready", "progress"}:
                    return
        finally:
            self.poisoned |= in_place
            self.updating = False


def _end(window: Any) -> int:
    return int(window.payload_offset + window.bytes)


def _is_last(message: Any, begin: Any) -> bool:
    return _end(message.ranges[-1]) == max(_bytes_end(tensor) for tensor in begin.manifest)


def _bytes_end(tensor: Any) -> int:
    size = {1: 2, 2: 2, 3: 4}[tensor.dtype]
    for dimension in tensor.shape:
        size *= dimension
    return int(tensor.offset + size) if size else 0


class Proxy:
    """A proxy between a client and a Unix socket that can cut the connection: bytes in transit are lost."""

    def __init__(self, path: str, upstream: str) -> None:
        self.address = f"unix:{path}"
        self.deaf = False  # reads the first bytes of a connection and closes it
        self._upstream = upstream
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.deaf:
                client.recv(100)
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._upstream)
            with self._lock:
                self._open += [client, server]
            for source, destination in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=[source, destination], daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, destination: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            while content := source.recv(1 << 16):
                destination.sendall(content)
            destination.shutdown(socket.SHUT_RDWR)
