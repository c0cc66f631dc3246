"""The soak: a fleet on this machine whose workers fail all the time, and what its clients see."""
