"""The machine that a cluster runs on: what it must have, and its processes."""
