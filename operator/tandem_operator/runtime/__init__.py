"""What the process runs on: the lease, the queue, the watches, health and metrics."""
