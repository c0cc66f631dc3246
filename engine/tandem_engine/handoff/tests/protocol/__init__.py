"""A deterministic model of the hand-off: the real code in a world without threads and clocks.

What is real: the core (`EngineCore`: scheduler, ledger, mock runner), both sides of the hand-off,
`HandoffService`, `Connection`, `Landing`, and the order in which one asyncio loop runs callbacks.

What is a model, because the real thing is the operating system's: the loop's selector and clock
(`loop.py`), sockets (`network.py`), and the threads and the memory of transports (`fabric.py`,
`staged.py`, `one_sided.py`).
`test_protocol_fidelity.py` holds these against what they stand for.

`world.py` lists what can happen next, `checks.py` says what must always hold, `machine.py` has the
rules that hypothesis plays.
"""
