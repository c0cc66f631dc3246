"""What is measured on a GPU: its own rates, calls in a graph, and lines of time against floor."""
