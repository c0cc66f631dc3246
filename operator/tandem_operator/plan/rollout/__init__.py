"""Which workers come and go: revisions, replacement, drain, probe."""
