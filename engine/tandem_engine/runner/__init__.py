"""Runners: they turn a batch of token positions into the next tokens, and own every tensor."""
