"""The node's fabric as sysfs shows it: GPUs, NICs, how near they are, and which NICs to use."""
