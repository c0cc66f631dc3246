"""The status that a plan writes: conditions, pools, policies."""
