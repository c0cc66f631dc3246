"""nano-vllm's published workload, request by request.

Its `bench.py` seeds Python's generator with 0, draws 256 prompts of 100 to 1,024 random ids below
10,000 and then as many answer lengths of 100 to 1,024; temperature 0.6, end tokens ignored. The
answers are 133,966 tokens in all, which is the "Total" of its table.
"""

import random
from dataclasses import dataclass
from typing import Final

from tandem_bench.errors import WorkloadError

TOKEN_IDS: Final = 10000


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineWorkload:
    """Ranges are inclusive, in tokens."""

    num_seqs: int = 256
    input_range: tuple[int, int] = (100, 1024)
    output_range: tuple[int, int] = (100, 1024)
    seed: int = 0
    temperature: float = 0.6

    def draw(self, vocab_size: int) -> list[tuple[list[int], int]]:
        """(prompt, number of tokens to generate) of every sequence.

        A vocabulary below 10,000 changes the ids, not the lengths.
        """
        for low, high in (self.input_range, self.output_range):
            if self.num_seqs < 1 or not 1 <= low <= high:
                raise WorkloadError(
                    f"{self.num_seqs} sequences of {low}-{high} tokens can't be drawn",
                    "write for example --num-seqs 256 --input-len 100-1024",
                )
        rng = random.Random(self.seed)
        prompts = [
            [rng.randint(0, TOKEN_IDS) % vocab_size for _ in range(rng.randint(*self.input_range))]
            for _ in range(self.num_seqs)
        ]
        return [(prompt, rng.randint(*self.output_range)) for prompt in prompts]
