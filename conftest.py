"""Settings that must be in place before any test imports torch or triton."""

import os
from pathlib import Path

# Idle OpenMP threads spin by default. On a busy machine that makes small models 10 to 30 times
# slower (measured with other test processes on the same two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Triton decides at import whether its own library is interpreted, and torch imports triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
