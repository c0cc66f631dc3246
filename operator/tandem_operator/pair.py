"""The two roles of a worker, and a pair: what prefill and decode both have."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

T = TypeVar("T", covariant=True)
U = TypeVar("U")


class Role(StrEnum):
    """What a worker does. The value is the one of the label `tandem.dev/role`."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Pair(Generic[T]):
    """One value for prefill and one for decode. A `Pair[int]` counts the workers of both pools."""

    prefill: T
    decode: T

    @staticmethod
    def build(make: Callable[[Role], U]) -> "Pair[U]":
        """The pair of what `make` returns for each role, prefill first."""
        return Pair(make(Role.PREFILL), make(Role.DECODE))

    def of(self, role: Role) -> T:
        """The value of one role."""
        return self.prefill if role is Role.PREFILL else self.decode

    def map(self, function: Callable[[T], U]) -> "Pair[U]":
        """The pair of what `function` returns for each value, prefill first."""
        return Pair(function(self.prefill), function(self.decode))

    def zip(self, other: "Pair[U]") -> "Pair[tuple[T, U]]":
        """The pair of both values of each role."""
        return Pair((self.prefill, other.prefill), (self.decode, other.decode))

    def put(self, role: Role, value: U) -> "Pair[T | U]":
        """A copy with another value for one role."""
        return Pair(value, self.decode) if role is Role.PREFILL else Pair(self.prefill, value)

    def items(self) -> Iterator[tuple[Role, T]]:
        """Both values with their roles, prefill first."""
        yield Role.PREFILL, self.prefill
        yield Role.DECODE, self.decode

    def __iter__(self) -> Iterator[T]:
        """Both values, prefill first."""
        yield self.prefill
        yield self.decode
