"""Decides what runs in the next step: queues, budget, admission, preemption; no torch."""
