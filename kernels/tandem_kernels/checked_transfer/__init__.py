"""KV pages packed for a transfer, or unpacked, with their checksum in the same pass.

For a GPU alone: `kernel.CheckedMover`. `reference` is what it does, in plain torch.
"""
