"""Settings that must be there before any test imports torch."""

import os

# Idle OpenMP threads spin by default. On a busy machine that makes small models 10 to 30 times
# slower (measured with other test processes on the same two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
