"""The worker: token ids in, token ids out."""
