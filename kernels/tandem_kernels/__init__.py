"""Every op three times: torch reference, Triton kernel, benchmark."""
