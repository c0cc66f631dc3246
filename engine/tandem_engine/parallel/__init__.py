"""A worker whose model is divided among processes: the ranks, and what passes between them.

The core process is rank 0 and keeps scheduler, cache and hand-off. It starts the other ranks, sends
each of them every step before it launches its own part, and asks them for the pages of their heads.
"""
