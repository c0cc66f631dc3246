"""The runner of a worker that is divided among ranks, for the core of the first rank."""

from dataclasses import dataclass

from tandem_engine.parallel.group import RankGroup
from tandem_engine.parallel.kv_store import ParallelKVStore, StepCount
from tandem_engine.parallel.step_codec import StepEncoder
from tandem_engine.step import Batch, PendingStep, Runner, SampledTokens


@dataclass(frozen=True, slots=True)
class _ParallelStep(PendingStep):
    """A step that every rank launches."""

    number: int
    inner: PendingStep
    group: RankGroup
    steps: StepCount

    def wait(self) -> list[SampledTokens | None]:
        try:
            results = self.inner.wait()
        except Exception as error:
            raise self.group.cause_of(error) from error
        self.steps.finished = self.number
        return results


class ParallelRunner(Runner):
    """Sends each step to every other rank, then launches it on the first.

    Args:
        inner: the first rank's runner, which has some of the heads and samples for all.
        kv: the pages of all ranks.
        steps: the steps that this runner launched, counted for `kv`.
    """

    def __init__(
        self, inner: Runner, kv: ParallelKVStore, group: RankGroup, steps: StepCount
    ) -> None:
        self.inner = inner
        self.group = group
        self.kv = kv
        self.vocab_size, self.eos_token_ids = inner.vocab_size, inner.eos_token_ids
        self.max_model_len, self.num_blocks = inner.max_model_len, inner.num_blocks
        self.plans_ahead, self.step_tokens = inner.plans_ahead, inner.step_tokens
        self.shapes = inner.shapes
        self._steps = steps
        self._encoder = StepEncoder()

    def execute(self, batch: Batch) -> list[SampledTokens | None]:
        return self.launch(batch).wait()

    def launch(self, batch: Batch) -> PendingStep:
        try:
            self.group.send(self._encoder.encode(batch))
            self._steps.launched += 1
            inner = self.inner.launch(batch)
        except Exception as error:
            raise self.group.cause_of(error) from error
        return _ParallelStep(self._steps.launched, inner, self.group, self._steps)

    def close(self) -> None:
        if self.group.is_broken:
            self.abandon()
            return
        self.group.stop()
        self.inner.close()
        self.group.close()

    def abandon(self) -> None:
        self.group.close(grace_seconds=0.0)
        self.inner.abandon()
