"""Requests for samples, and the samples."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

import grpc
import numpy as np
from numpy.typing import NDArray

from . import _wire as wire
from .errors import RolloutError, from_status

Prompt = Union[str, Sequence[int], "NDArray[np.integer[Any]]"]
"""Token ids (a list, a NumPy array, a torch tensor) or text, which needs a tokenizer."""

FinishReason = Literal["stop", "length", "abort", "error"]
"""stop: end of sequence, a stop token or a stop string. length: max_tokens or the context's end. abort: ended early, with the tokens drawn
until then. error: ``Sample.error`` says why."""


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a sample were drawn from the weights of this version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class TopLogprobs:
    """Alternatives, one row per position, most probable first. Model log-probabilities."""

    ids: NDArray[np.int32]
    """[rows, k]"""

    logprobs: NDArray[np.float32]
    """[rows, k]"""

    @staticmethod
    def from_wire(top: Any) -> TopLogprobs | None:
        if top.k == 0:
            return None
        return TopLogprobs(int32(top.ids).reshape(-1, top.k), float32(top.logprobs).reshape(-1, top.k))


@dataclass(frozen=True)
class PromptInfo:
    """The prompt of a group as the sidecar reports it."""

    ids: NDArray[np.int32]
    """Only where the prompt was text, else empty."""

    logprobs: NDArray[np.float32]
    """Model log-probabilities of prompt tokens 1.., if requested, else empty."""

    cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""


@dataclass(frozen=True)
class Sample:
    """A sample that has ended. The arrays over its tokens have the same length."""

    request_id: str
    index: int
    """Index in the group, 0..n-1."""

    seed: int
    """Seed of the group: the same seed, index, prompt and weights give the same tokens."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    """Natural logarithm of each token's probability under the model: temperature 1, nothing added or removed."""

    sampling_logprobs: NDArray[np.float32]
    """The same under the distribution that the token was drawn from: after bias, temperature and truncation."""

    versions: tuple[VersionSpan, ...]
    """The weights version of each span of tokens, in order, without gaps."""

    oldest_kv_version: int
    """Oldest weights version that made any key or value this sample was drawn with."""

    finish_reason: FinishReason
    prompt: PromptInfo
    top: TopLogprobs | None = None
    """One row per token; None unless requested."""

    text: str = ""
    """Empty unless requested."""

    error: str = ""
    """With finish reason "error", else empty."""


_STATUS = {status.value[0]: status for status in grpc.StatusCode}


def int32(values: Any) -> NDArray[np.int32]:
    return np.fromiter(values, np.int32, len(values))


def float32(values: Any) -> NDArray[np.float32]:
    return np.fromiter(values, np.float32, len(values))


def token_ids(ids: Any, argument: str) -> Any:
    """Token ids in the form of the wire. Raises TypeError or ValueError naming the argument."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size > 0 and array.dtype.kind not in "iu"):
        raise TypeError(f"{argument}: expected a text or a sequence of token ids, got {type(ids).__name__} {ids!r:.80}")
    if array.size > 0 and not 0 <= int(array.min()) <= int(array.max()) < 1 << 32:
        raise ValueError(f"{argument}: token ids are at least 0 and less than 2^32")
    return wire.TokenIds(ids=array.tolist())


class Batch:
    """The groups of one GenerateBatch call: their requests, and the samples assembled from the replies."""

    def __init__(self, prompts: Sequence[Prompt], n: int, seeds: Sequence[int | None], settings: Mapping[str, Any]) -> None:
        self._n = n
        self._requests: dict[str, Any] = {}
        common = wire.filled(wire.GenerateRequest, n=n, **settings)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
            request = wire.filled(wire.GenerateRequest, request_id=uuid.uuid4().hex, seed=seed)
            request.MergeFrom(common)
            if isinstance(prompt, str):
                request.prompt_text = prompt
            else:
                request.prompt_ids.CopyFrom(token_ids(prompt, f"prompts[{i}]"))
            self._requests[request.request_id] = request
        self._samples: dict[str, dict[int, Sample]] = {request_id: {} for request_id in self._requests}
        self._heads: dict[str, tuple[int, PromptInfo]] = {}
        self.refused: dict[str, RolloutError] = {}

    def requests(self) -> Iterator[Any]:
        return iter(self._requests.values())

    def add(self, reply: Any) -> None:
        """Adds one reply of the sidecar. Raises RolloutError where it does not match the request."""
        request_id = reply.request_id
        if request_id not in self._requests:
            raise RolloutError(f"the sidecar answered for request {request_id!r}, which is not in flight")
        if reply.HasField("refused"):
            self.refused[request_id] = from_status(_STATUS[reply.refused.code], reply.refused.message, request_id)
            return
        if reply.HasField("seed"):
            prompt = PromptInfo(int32(reply.prompt.ids), float32(reply.prompt.logprobs), reply.prompt.cached_tokens)
            self._heads[request_id] = reply.seed, prompt
        for chunk in reply.samples:
            self._add(request_id, chunk)

    def groups(self) -> list[list[Sample] | None]:
        """In the order of the prompts, each in the order of its samples; None for a group that was refused."""
        groups: list[list[Sample] | None] = []
        for request_id, samples in self._samples.items():
            if request_id not in self.refused and len(samples) < self._n:
                raise RolloutError(
                    f"the sidecar ended the call with {len(samples)} of {self._n} samples of request {request_id!r}", request_id=request_id)
            groups.append(None if request_id in self.refused else [samples[i] for i in range(self._n)])
        return groups

    def _add(self, request_id: str, chunk: Any) -> None:
        samples = self._samples[request_id]
        # Requests do not stream, so there is one reply for each sample, when it ends.
        whole = chunk.start == 0 and len(chunk.ids) == len(chunk.logprobs) == len(chunk.sampling_logprobs)
        if not whole or chunk.index >= self._n or chunk.index in samples or request_id not in self._heads or not chunk.finish_reason:
            raise RolloutError(f"the sidecar sent a chunk of sample {chunk.index} of request {request_id!r} that does not fit")
        seed, prompt = self._heads[request_id]
        samples[chunk.index] = Sample(
            request_id=request_id,
            index=chunk.index,
            seed=seed,
            ids=int32(chunk.ids),
            logprobs=float32(chunk.logprobs),
            sampling_logprobs=float32(chunk.sampling_logprobs),
            versions=tuple(VersionSpan(span.version, span.start, span.end) for span in chunk.versions),
            oldest_kv_version=chunk.oldest_kv_version,
            finish_reason=wire.FINISH_REASON.name(chunk.finish_reason),  # type: ignore[arg-type]
            prompt=prompt,
            top=TopLogprobs.from_wire(chunk.top),
            text=chunk.text,
            error=chunk.error,
        )
