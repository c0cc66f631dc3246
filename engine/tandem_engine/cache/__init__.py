"""Which KV block belongs to whom, and which block already holds a prefix; no torch."""
