"""The two roles of a worker, and a pair: what prefill and decode both have."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Role(StrEnum):
    """What a worker does. The value is the one of the label `tandem.dev/role`."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Pair(Generic[T]):
    """One value for prefill and one for decode. `Pair[int]` counts workers in both pools."""

    prefill: T
    decode: T

    @classmethod
    def build(cls, make: Callable[[Role], T]) -> "Pair[T]":
        """The pair of what `make` returns for each role, prefill first."""
        return cls(make(Role.PREFILL), make(Role.DECODE))

    def of(self, role: Role) -> T:
        """The value of one role."""
        return self.prefill if role is Role.PREFILL else self.decode

    def map(self, function: Callable[[T], U]) -> "Pair[U]":
        """The pair of results of `function`."""
        return Pair(function(self.prefill), function(self.decode))

    def items(self) -> Iterator[tuple[Role, T]]:
        """Both values with their roles, prefill first."""
        yield Role.PREFILL, self.prefill
        yield Role.DECODE, self.decode

    def __iter__(self) -> Iterator[T]:
        """Both values, prefill first."""
        yield self.prefill
        yield self.decode
