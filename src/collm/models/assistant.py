"""The interface of an author: a model or a tool that gives next-token distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from collm.core.types import ModelUsage


@dataclass(frozen=True)
class ModelOutput:
    """Output for the last tokens of each extended sequence.

    Attributes:
        logits: next-token logits, shape (R, V), sequence by sequence, for the requested positions.
        hidden: last hidden states, shape (R, H); None for an assistant without hidden states.
        abstained: whether the assistant abstains, per row; empty for an assistant that never abstains.
    """

    logits: Tensor
    hidden: Tensor | None = None
    abstained: Sequence[bool] = ()


class Limited(Protocol):
    """Anything with a maximum sequence length."""

    name: str

    @property
    def max_length(self) -> int | None: ...


class Assistant(Protocol):
    """Anything that gives a next-token distribution for a prefix: a model or a tool.

    A slot holds one sequence, and `length` is the number of its tokens that the assistant has read. An assistant that
    is m tokens behind catches up with one `extend` of m tokens. The base writes where an assistant abstains.
    """

    name: str
    usage: ModelUsage

    @property
    def max_length(self) -> int | None: ...

    @property
    def may_abstain(self) -> bool: ...

    @property
    def capacity(self) -> int | None:
        """Positions that all slots together can hold, in pages of `kv_cache.PAGE`; None if unlimited."""

    @property
    def most_slots(self) -> int | None:
        """Number of slots that can be open at once; None if unlimited."""

    def open(self, token_ids: Sequence[int]) -> int: ...

    def close(self, slot: int, *, wipe: bool = False) -> None: ...

    def forget(self) -> None: ...

    def length(self, slot: int) -> int: ...

    def rollback(self, slot: int, length: int) -> None: ...

    def extend(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None) -> ModelOutput: ...
