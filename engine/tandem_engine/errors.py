"""Errors of the worker.

TandemEngineError
├── ConfigError (ValueError)     a flag makes no sense; the message names it and the remedy
├── LedgerError                  a block has no owner, or two: a bug; the core stops
├── CorruptKVError               pages don't hold the KV of their tokens (mock runner)
├── RankDiedError                a rank of a tensor-parallel worker is gone; the worker ends
├── StagingUnavailableError      a KV store has no memory that another process can map
├── GateShutError                this process may not write to another one's cache any more
└── CoreDiedError                the core process ended unasked
"""


class TandemEngineError(Exception):
    """Root of the tree."""


class ConfigError(TandemEngineError, ValueError):
    """A flag or an environment variable makes no sense; the user can fix it."""


class LedgerError(TandemEngineError):
    """The block ledger's invariants no longer hold."""


class CorruptKVError(TandemEngineError):
    """KV pages hold something other than the KV of the tokens that they stand for."""


class RankDiedError(TandemEngineError):
    """A rank's process is gone; the message ends with the last lines of its log."""


class StagingUnavailableError(TandemEngineError):
    """A KV store can't share memory with another process; the message says why."""


class GateShutError(TandemEngineError):
    """A writer was not admitted to another process's cache: it has lost the right to write."""


class CoreDiedError(TandemEngineError):
    """The core process is gone."""
