"""What keeps a cluster running, records how it is, and ends it."""
