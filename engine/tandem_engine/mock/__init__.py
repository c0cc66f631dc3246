"""A runner without a model: deterministic tokens, a latency model, KV that proves itself."""
