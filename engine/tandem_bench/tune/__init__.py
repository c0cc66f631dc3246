"""Tools that look for the kernels' fastest configurations on this GPU."""
