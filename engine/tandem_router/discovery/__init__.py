"""Where the workers are: a static list, or the pods of a service."""
