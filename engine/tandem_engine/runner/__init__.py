"""Runners: what turns a batch of token positions into the next tokens, and owns every tensor."""
