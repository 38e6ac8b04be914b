"""Weights that several processes have slices of, as the ranks of FSDP do: each sends its own to the sidecar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import RolloutError
from .tensors import TensorSource

T = TypeVar("T")


class OtherRankError(RolloutError):
    """Another rank's push has failed; the message is what it said."""


@dataclass(frozen=True)
class ShardGroup:
    """The ranks that push together. All call ``push_weights`` at the same time, with the same arguments but for the weights."""

    rank: int
    """This process; rank 0 begins the update and commits it."""

    ranks: int

    exchange: Callable[[Any], list[Any]]
    """Called by all ranks at the same time with an object that can be pickled, names, offsets and digests and no weights; returns those of
    all ranks, in order. It must raise where a rank is gone. With PyTorch::

        def exchange(own):
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, own)
            return every
    """

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank={self.rank!r} of ranks={self.ranks!r}")

    def all(self, action: Callable[[], T]) -> list[T]:
        """Does something on all ranks; what came out, in order of rank. Where it fails on one, it fails on all."""
        own: T | None = None
        error: BaseException | None = None
        try:
            own = action()
        except BaseException as raised:
            error = raised
        answers = self.exchange((own, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        failed = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(answers) if message is not None]
        if failed:
            raise OtherRankError("; ".join(failed))
        return [answer for answer, _ in answers]

    def own(self, action: Callable[[], list[TensorSource]]) -> list[TensorSource]:
        """The tensors that this rank is to send: its slices, and whole tensors that no rank before it has."""
        tensors: list[TensorSource] = []

        def names() -> set[str]:
            tensors.extend(action())
            return {tensor.name for tensor in tensors if tensor.rows is None}

        before: set[str] = set().union(*self.all(names)[: self.rank])
        return [tensor for tensor in tensors if tensor.rows is not None or tensor.name not in before]
