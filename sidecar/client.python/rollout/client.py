"""The connection to a sidecar."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import grpc
import numpy as np

from . import _wire as wire
from . import control
from .address import target
from .control import Aborted, EngineState, FreedMemory, MemoryTag, PauseMode, Score, Slept, Status, WeightsDescription
from .errors import BatchError, RolloutTimeoutError, UnavailableError, from_rpc
from .generation import Batch, Prompt, Sample, token_ids
from .weights.publisher import Publisher
from .weights.push import PushResult

if TYPE_CHECKING:
    from .weights.shards import ShardGroup
from .weights.tensors import Weights

_WORK_TIMEOUT = 3600.0
_CONTROL_TIMEOUT = 30.0
_READY_POLL = 0.05


class Rollout:
    """A sidecar, over its Unix socket or TCP port. Safe from any thread; weight pushes run one at a time, a second one waits.

        with Rollout("unix:/tmp/rollout.sock") as rollout:
            groups = rollout.generate(prompts, n=16, max_tokens=256, seed=step)
            ...
            rollout.push_weights(model)

    Every call raises a RolloutError when it fails: UnavailableError where the sidecar cannot be reached, RolloutTimeoutError after
    ``timeout`` seconds, RequestError for an invalid request, StateError for one that the engine's state does not allow.
    """

    def __init__(self, address: str) -> None:
        """
        Args:
            address: ``unix:/path``, ``host:port`` or ``http://host:port``. The connection is made by the first call.
        """
        self.address = address
        self._channel = grpc.insecure_channel(target(address), options=[
            # Replies are as large as the requested samples, so their size is not limited: the sidecar is trusted.
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_http_proxy", 0),
            # A connection of its own: with it the sidecar closes the GPU memory and leaves the group that this client's pushes have named.
            ("grpc.use_local_subchannel_pool", 1),
            # A machine that has crashed is noticed within a minute, a restarted sidecar within a second.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 30_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ])
        self._calls = wire.Calls(self._channel)
        self._publisher = Publisher(self._calls, address)

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends calls in progress, frees the shared memory and closes the connection."""
        self._channel.close()
        self._publisher.close()

    def wait_until_ready(self, timeout: float = 300.0) -> Status:
        """Returns once the sidecar listens and has loaded its model. Raises RolloutTimeoutError with its last answer."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                status = self.status(timeout=max(0.1, min(5.0, deadline - time.monotonic())))
                if status.state != "loading":
                    return status
                answer: str = status.state
            except (UnavailableError, RolloutTimeoutError) as error:
                answer = str(error)
            if time.monotonic() + _READY_POLL >= deadline:
                raise RolloutTimeoutError(f"the sidecar at {self.address} was not ready after {timeout:g} s; its last answer: {answer}")
            time.sleep(_READY_POLL)

    def generate(
        self,
        prompts: Iterable[Prompt],
        *,
        n: int = 1,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        return_text: bool = False,
        max_staleness: int | None = None,
        cache_salt: str = "",
        timeout: float | None = _WORK_TIMEOUT,
    ) -> list[list[Sample]]:
        """Draws n samples of every prompt, all on one call, and returns when the last one has ended.

        Args:
            prompts: Token ids or text, a group of samples each.
            n: Samples of a group.
            max_tokens: Most tokens of a sample. None: up to the model's context length.
            min_tokens: End-of-sequence and stop tokens are forbidden until a sample has this many.
            temperature: 0 is greedy.
            top_k: Keep the k most probable tokens. 0: off.
            top_p: Keep the most probable tokens that together have this share. 1: off.
            min_p: Keep tokens at least this many times as probable as the most probable one. 0: off.
            logit_bias: Added to the logit of a token before temperature; minus infinity forbids it.
            seed: Of the first group, plus one for each that follows; or a seed for each. None: random, see ``Sample.seed``. Sample i
                of a group depends only on weights, prompt, these arguments, the group's seed and i.
            stop_token_ids: End a sample, besides end of sequence. The token itself is part of the sample.
            stop: Texts that end a sample; needs a tokenizer. Ids are never cut, the text ends before the match.
            ignore_eos: Continue past end of sequence.
            top_logprobs: Most probable alternatives to report for each sampled token.
            prompt_logprobs: Report the model log-probability of every prompt token after the first. The prompt is then computed in full.
            return_text: Return text as well as token ids; needs a tokenizer.
            max_staleness: End a sample, with finish reason "abort", when new weights make its oldest token more than this many versions old.
            cache_salt: Calls with different salts never share cached keys and values.
            timeout: Of the whole call, in seconds. None: no limit.

        Returns:
            A list of n samples for each prompt, in their order.

        Raises:
            BatchError: Groups were refused; it has the samples of the others. With a single prompt, the refusal itself is raised.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a list of prompts; write [prompt] for a single one")
        prompts = list(prompts)
        if not prompts:
            return []
        settings = {
            "sampling": {
                "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "logit_bias": dict(logit_bias or {}),
            },
            "stopping": {
                "max_tokens": max_tokens, "min_tokens": min_tokens, "stop_token_ids": stop_token_ids, "stop_strings": _texts(stop, "stop"),
                "ignore_eos": ignore_eos,
            },
            "top_logprobs": top_logprobs,
            "prompt_logprobs": prompt_logprobs,
            "return_text": return_text,
            "max_staleness": max_staleness,
            "cache_salt": cache_salt,
        }
        batch = Batch(prompts, n, _seeds(seed, len(prompts)), settings)
        call = self._calls.generate_batch(batch.requests(), timeout=timeout)
        try:
            for reply in call:
                batch.add(reply)
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        finally:
            call.cancel()  # an interrupted caller's samples end with it
        groups = batch.groups()
        refused = list(batch.refused.values())
        if refused and len(prompts) == 1:
            raise refused[0]
        if refused:
            raise BatchError(refused, groups)
        return [group for group in groups if group is not None]

    def score(self, ids_or_text: Prompt, *, top: int = 0, cache_salt: str = "", timeout: float | None = _WORK_TIMEOUT) -> Score:
        """Log-probabilities of given tokens under the current weights: for a teacher, a reference policy or evaluation.

        Args:
            top: Alternatives to report at every position.
        """
        text = isinstance(ids_or_text, str)
        source = {"text": ids_or_text} if text else {"ids": token_ids(ids_or_text, "ids_or_text")}
        return Score.from_wire(self._call(self._calls.score, wire.filled(wire.ScoreRequest, top=top, cache_salt=cache_salt, **source), timeout))

    def abort(self, request_ids: Iterable[str] | None = None, *, timeout: float | None = _CONTROL_TIMEOUT) -> Aborted:
        """Ends groups early; their callers get the partial tokens with finish reason "abort". None: every group, of all callers."""
        if request_ids is None:
            request = wire.AbortRequest(all=True)
        else:
            request = wire.AbortRequest(ids=wire.RequestIds(ids=_texts(request_ids, "request_ids")))
        reply = self._call(self._calls.abort, request, timeout)
        return Aborted(reply.groups, reply.samples, tuple(reply.unknown))

    def status(self, *, timeout: float | None = _CONTROL_TIMEOUT) -> Status:
        """What the sidecar is doing. Answers at once, also during an update."""
        return Status.from_wire(self._call(self._calls.status, wire.StatusRequest(), timeout))

    def pause(self, mode: PauseMode, *, owner: str, lease: float, timeout: float | None = None) -> int:
        """Returns once no step runs any more, with the number of samples that the mode "abort" has ended.

        Args:
            owner: Shown in the status while paused.
            lease: Seconds after which the pause ends by itself, so that a dead owner does not block the sidecar; pausing again renews it.
            timeout: None: the lease, at least 30 seconds.
        """
        request = wire.PauseRequest(mode=wire.PAUSE_MODE.number(mode, "mode"), owner=owner, lease_milliseconds=round(lease * 1000))
        return int(self._call(self._calls.pause, request, timeout or max(lease, _CONTROL_TIMEOUT)).aborted_samples)

    def resume(self, *, timeout: float | None = _CONTROL_TIMEOUT) -> EngineState:
        """Ends a pause. Does nothing where there is none."""
        return control.state(self._call(self._calls.resume, wire.ResumeRequest(), timeout))

    def sleep(
        self, tags: Iterable[MemoryTag] | None = None, *, keep_weights: bool = False, timeout: float | None = _CONTROL_TIMEOUT
    ) -> Slept:
        """Gives memory back and returns when it is free. No sample may be in flight. None: all memory.

        Weights are discarded: after waking, only a full push makes the engine serve again. With ``keep_weights``, on a GPU, the host's
        memory keeps them, and waking copies them back.
        """
        reply = self._call(self._calls.sleep, wire.SleepRequest(tags=_tags(tags), keep_weights=keep_weights), timeout)
        freed = {control.tags([one.tag])[0]: FreedMemory.from_wire(one) for one in reply.freed}
        return Slept(control.state(reply), freed, control.tags(reply.asleep))

    def wake_up(self, tags: Iterable[MemoryTag] | None = None, *, timeout: float | None = _CONTROL_TIMEOUT) -> EngineState:
        """Allocates the memory that ``sleep`` gave back. None: all of it."""
        return control.state(self._call(self._calls.wake_up, wire.WakeUpRequest(tags=_tags(tags)), timeout))

    def describe(self, *, timeout: float | None = _CONTROL_TIMEOUT) -> WeightsDescription:
        """Names, shapes, types and digests of the weights being served, as an update would send them."""
        return WeightsDescription.from_wire(self._call(self._calls.describe, wire.DescribeRequest(), timeout))

    def push_weights(
        self,
        weights: Weights,
        *,
        version: int | None = None,
        base_version: int | None = None,
        policy: Literal["recompute", "keep", "drain", "abort"] = "recompute",
        mode: Literal["auto", "staged", "in_place"] = "auto",
        partial: bool = False,
        transport: Literal["auto", "cuda_ipc", "nccl", "shared_memory", "inline", "file"] = "auto",
        folder: str | PathLike[str] | None = None,
        max_shared_memory_bytes: int | None = None,
        verify: bool | None = None,
        dtype: Literal["bfloat16"] | None = "bfloat16",
        owner: str | None = None,
        timeout: float = 600.0,
        shards: ShardGroup | None = None,
    ) -> PushResult:
        """Makes these weights the ones the next token is drawn from: all of them or none.

        Args:
            weights: A torch module (parameters and persistent buffers), a state dict of torch tensors, or a dict of NumPy arrays or of GPU
                arrays with ``__cuda_array_interface__``; full tensors under the Hugging Face checkpoint's names, or a SparseTensor of some
                elements, or the TensorSlices (one, or a list) that together are the tensor. A tensor tied under two names may be given under both. Read during the call only.
            version: Must be greater than the one they replace. None: one more than it.
            base_version: The version they replace; the sidecar refuses the push where it serves another. None: the one this client pushed last,
                so that a push by a second trainer is detected; before the first push, and after a failed one, the version it serves.
            policy: For samples in flight. recompute: drop their keys and values, recompute them under the new weights, continue.
                keep: continue with the old keys and values; each token has its version. drain: let groups that have begun end first.
                abort: end them; they return their partial tokens.
            mode: staged: into a second set of weights; a failure leaves the old ones. in_place: over them; a failure poisons the engine.
                auto: staged where there is memory for it.
            partial: ``weights`` has some of the model's tensors; the others stay. Without it a missing tensor is an error.
            transport: cuda_ipc: the sidecar reads tensors where they are, on the GPU that it runs on too; only those that must be
                converted or cannot be named to it (PyTorch's expandable segments) are copied there first. nccl: from the tensors' GPU
                to the sidecar's, another one, by a group that is kept from push to push. shared_memory: through the sidecar's own
                memory, or where that cannot be opened (it is in another container, or another user's) through a file in /dev/shm; kept
                from push to push. inline: in the gRPC stream, from any machine, slower. file: through a safetensors file in
                ``folder``, which is removed afterwards; no sparse tensors. auto: cuda_ipc where all tensors are on the sidecar's GPU,
                nccl where they are on another and this process finds NCCL, shared_memory where the sidecar is on this machine and its
                memory can be opened, else inline. The result says which, and why.
            folder: For transport='file': one that trainer and sidecar both see.
            max_shared_memory_bytes: Most shared memory to use. A larger payload reuses it as a ring, as it does where the machine has
                less memory free. None: as much as the payload has.
            verify: Let the sidecar commit only if it received what was sent. None: checked where the bytes pass through the host's memory
                and xxhash is installed. True: also on the GPU, by copying everything to the host to hash it. False: never.
            dtype: bfloat16: floating-point tensors are rounded to it, to nearest, ties to even. None: sent as they are.
            owner: Named in the error that a second updater gets. None: host name and process id.
            timeout: Of the whole push, in seconds. The sidecar gets the same deadline and drops the update when it passes.
            shards: The ranks that push together, each the TensorSlices or DTensors (sharded along dimension 0) that it has, with no gather.
                What several ranks have whole is sent by the first of them. The sidecar commits when all parts are there; a rank that fails
                ends the push on all.

        Raises:
            TypeError: Tensors that cannot be served; lists all of them.
            ValueError: An argument nobody knows, or indices of sparse tensors that do not ascend or leave their tensor.
            WeightUpdateRejected: Names, shapes, types or versions are wrong; lists everything found. No byte was sent.
            WeightUpdateFailed: It began and did not succeed; ``outcome`` says which weights are served.
            CudaError: The GPU's driver or NCCL failed, or there is no memory.
            PayloadFileError: ``folder`` is missing or has no room; SharedMemoryError where it is /dev/shm that has none.
            StateError: Another update is in progress (the message names its owner), or the engine's state allows none.
        """
        return self._publisher.push(
            weights, version=version, base_version=base_version, policy=policy, mode=mode, partial=partial, transport=transport,
            folder=folder, max_shared_memory_bytes=max_shared_memory_bytes, verify=verify, dtype=dtype, owner=owner, timeout=timeout,
            shards=shards)

    def release_memory(self, *, timeout: float | None = _CONTROL_TIMEOUT) -> int:
        """Lets the sidecar close the GPU memory that pushes have named and leave their NCCL group, and frees the buckets of this client.

        Memory that the trainer frees, as ``torch.cuda.empty_cache()`` does, is free for others only after this or the next push.

        Returns:
            The number of allocations that the sidecar had open.
        """
        return self._publisher.release_memory(timeout)

    @staticmethod
    def _call(call: wire.UnaryCall, request: Any, timeout: float | None) -> Any:
        try:
            return call(request, timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc(error) from error


def _seeds(seed: int | Sequence[int] | None, groups: int) -> Sequence[int | None]:
    if seed is None:
        return [None] * groups
    if isinstance(seed, (int, np.integer)):
        return [(int(seed) + i) % (1 << 64) for i in range(groups)]
    if len(seed) != groups:
        raise ValueError(f"seed: {len(seed)} seeds for {groups} prompts")
    return seed


def _texts(texts: Iterable[str], argument: str) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{argument}: expected a list of texts; write [{texts!r:.40}] for a single one")
    return list(texts)


def _tags(tags: Iterable[MemoryTag] | None) -> list[int]:
    if tags is None:
        return []
    numbers = [wire.MEMORY_TAG.number(tag, "tags") for tag in _texts(tags, "tags")]
    if not numbers:
        raise ValueError("tags: none given; leave it out for all of them")  # on the wire, none means all
    return numbers
