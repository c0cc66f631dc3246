"""Which workers are created, replaced and drained, and when KV is probed."""
