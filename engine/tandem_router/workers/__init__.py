"""One connection per worker: what it said last, what runs there, and whether it can be trusted."""
