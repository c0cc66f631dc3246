"""One machine, no GPU: the embedded cluster and what runs on it."""
