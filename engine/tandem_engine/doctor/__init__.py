"""What a node or a pod has for moving KV, what it lacks, and what to do about each."""
