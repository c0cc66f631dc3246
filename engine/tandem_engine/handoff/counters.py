"""What the hand-off counts; written on its loop, read from any thread."""

from collections import defaultdict


class Counters:
    """Monotonic totals by metric name (without the `tandem_` prefix, labels included)."""

    def __init__(self) -> None:
        self._totals: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count `amount` more; labels become part of the name as Prometheus writes them."""
        if labels:
            name += "{" + ",".join(f'{key}="{labels[key]}"' for key in sorted(labels)) + "}"
        self._totals[name] += amount

    def totals(self) -> dict[str, float]:
        """A copy of all totals."""
        return dict(self._totals)
