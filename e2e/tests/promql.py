"""Reads PromQL as far as rules and dashboards use it: which metrics, by which labels.

It understands selectors, functions, and aggregations whose labels come before their argument, as in
`sum by (pod) (rate(x[5m]))`. Anything else is an error.
"""

import re
from dataclasses import dataclass, field
from typing import Final

AGGREGATIONS: Final = frozenset({"avg", "count", "max", "min", "sum"})
FUNCTIONS: Final = frozenset(
    {"absent", "histogram_quantile", "increase", "label_values", "max_over_time", "rate"}
)
"""`label_values` is Grafana's, for the values of a variable."""
_SET_OPERATORS: Final = frozenset({"and", "or", "unless"})
_TOKEN: Final = re.compile(
    r'\s*("(?:[^"\\]|\\.)*"|[A-Za-z_:][\w:]*|\d[\w.]*|\$\w+|=~|!~|!=|[<>=]=?|[-+*/{}()\[\],])'
)


class QueryError(ValueError):
    """The reader doesn't understand a query."""


@dataclass(frozen=True)
class Selector:
    """A metric with its matchers (label to operator and value), and the labels that it is kept by.

    `kept` are those of the aggregation around it, or None without one; `compared` are those of an
    `on (…)` beside it.
    """

    metric: str
    matchers: dict[str, tuple[str, str]]
    kept: frozenset[str] | None
    compared: frozenset[str] = field(default=frozenset())

    @property
    def labels(self) -> frozenset[str]:
        """Every label that the query relies on."""
        return frozenset(self.matchers) | (self.kept or frozenset()) | self.compared


def read(query: str) -> list[Selector]:
    """The selectors of a query. Raises QueryError."""
    return _Reader(query).read()


class _Reader:
    def __init__(self, query: str) -> None:
        self._query = query
        self._tokens = _split(query)
        self._at = 0
        self._found: list[Selector] = []
        self._compared: set[str] = set()

    def read(self) -> list[Selector]:
        self._expression(None, closing="")
        on = frozenset(self._compared)
        return [Selector(each.metric, each.matchers, each.kept, on) for each in self._found]

    def _fail(self, what: str) -> QueryError:
        return QueryError(f"{what} before {' '.join(self._tokens[self._at :])!r} in {self._query}")

    def _next(self, *wanted: str) -> str:
        token = self._peek()
        if not token or (wanted and token not in wanted):
            raise self._fail(f"expected {' or '.join(wanted) or 'more'}")
        self._at += 1
        return token

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _expression(self, kept: frozenset[str] | None, closing: str) -> None:
        """Everything up to the closing bracket; `kept` are the labels of the aggregation around."""
        while (token := self._peek()) != closing:
            if not token:
                raise self._fail(f"{closing!r} is missing")
            self._at += 1
            if token == "(":
                self._expression(kept, ")")
            elif token == "on":
                self._compared |= self._names()
            elif re.match(r"[A-Za-z_:]", token) and token not in _SET_OPERATORS:
                self._named(token, kept)
            elif token in ("{", "[", ")", "]", "}"):
                raise self._fail(f"a stray {token}")
        if closing:
            self._next(closing)

    def _named(self, name: str, kept: frozenset[str] | None) -> None:
        if name in AGGREGATIONS:
            by = frozenset[str]()
            if self._peek() == "by":
                self._next("by")
                by = self._names()
            self._next("(")
            self._expression(by, ")")
        elif self._peek() == "(":
            if name not in FUNCTIONS:
                raise self._fail(f"unknown function {name}")
            self._next("(")
            self._expression(kept, ")")
        else:
            self._found.append(Selector(name, self._matchers(), kept))
            if self._peek() == "[":
                self._next("[")
                self._next()
                self._next("]")

    def _names(self) -> frozenset[str]:
        names = []
        self._next("(")
        while (token := self._next()) != ")":
            if token != ",":
                names.append(token)
        return frozenset(names)

    def _matchers(self) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        if self._peek() != "{":
            return found
        self._next("{")
        while self._peek() != "}":
            label = self._next()
            found[label] = (self._next("=", "!=", "=~", "!~"), self._next().strip('"'))
            if self._peek() != "}":
                self._next(",")
        self._next("}")
        return found


def _split(query: str) -> list[str]:
    tokens, at = [], 0
    text = query.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise QueryError(f"can't read {text[at:]!r} in {query}")
        tokens.append(match[1])
        at = match.end()
    return tokens
