"""The synthetic workload: uniform lengths, random tokens, optionally shared prefixes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tandem_bench.errors import WorkloadError
from tandem_bench.workload.arrivals import arrival_times
from tandem_bench.workload.planned import PlannedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLengths:
    """Ranges are inclusive and drawn uniformly; all in tokens."""

    input_range: tuple[int, int] = (512, 512)
    output_range: tuple[int, int] = (128, 128)
    prefix_share: float = 0.0  # of each prompt that comes from one of the common prefixes
    num_prefixes: int = 1  # how many common prefixes there are

    def check(self) -> None:
        """Raise WorkloadError for lengths or shares that can't be drawn."""
        for name, (low, high) in (("input", self.input_range), ("output", self.output_range)):
            if not 1 <= low <= high:
                raise WorkloadError(
                    f"--{name}-len {low}-{high} is not a range of positive numbers",
                    f"write --{name}-len 512 or --{name}-len 100-1024",
                )
        if not 0.0 <= self.prefix_share <= 1.0 or self.num_prefixes < 1:
            raise WorkloadError(
                f"--prefix-share {self.prefix_share:g} must be 0 to 1, and --num-prefixes "
                f"{self.num_prefixes} must be 1 or more",
                "write for example --prefix-share 0.5 --num-prefixes 8",
            )


def plan_random(
    lengths: RandomLengths, rate: float | None, seed: int, burstiness: float = 1.0
) -> Iterator[PlannedRequest]:
    """Endless requests; `rate` in requests per second, None for a closed loop."""
    lengths.check()
    rng = np.random.default_rng([seed, 1])
    times = arrival_times(
        math.inf if rate is None else rate, np.random.default_rng([seed, 2]), burstiness
    )
    longest = math.ceil(lengths.input_range[1] * lengths.prefix_share)
    for number, at in enumerate(times):
        num_input = int(rng.integers(*lengths.input_range, endpoint=True))
        num_output = int(rng.integers(*lengths.output_range, endpoint=True))
        prefix = int(rng.integers(lengths.num_prefixes))
        shared = round(num_input * lengths.prefix_share)
        yield PlannedRequest(
            number,
            at,
            num_input,
            num_output,
            block_ids=(prefix,) if shared else (),
            block_tokens=longest if shared else 0,
            shared_tokens=shared,
        )
