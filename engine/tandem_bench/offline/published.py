"""nano-vllm's published workload, request by request.

Its `bench.py` seeds Python's generator with 0, draws 256 prompts of 100 to 1,024 random ids of 0 to
10,000 and then as many answer lengths of 100 to 1,024; temperature 0.6, end tokens ignored. The
prompts are 142,827 tokens in all, the answers 133,966, which is the "Total" of its table.
"""

import random
from dataclasses import dataclass
from typing import Final

from tandem_bench.errors import WorkloadError

LARGEST_ID: Final = 10_000


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

        A vocabulary of 10,000 or less changes the ids, not the lengths.
        """
        for low, high in (self.input_range, self.output_range):
            if self.num_seqs < 1 or not 1 <= low <= high:
                raise WorkloadError(
                    f"{self.num_seqs} sequences of {low} to {high} tokens can't be drawn",
                    "write for example --num-seqs 256 --input-len 100-1024",
                )
        rng = random.Random(self.seed)
        prompts = [
            [rng.randint(0, LARGEST_ID) % vocab_size for _ in range(rng.randint(*self.input_range))]
            for _ in range(self.num_seqs)
        ]
        return [(prompt, rng.randint(*self.output_range)) for prompt in prompts]
