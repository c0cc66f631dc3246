"""Carries a plan out: writes to the API server, calls to workers, events."""
