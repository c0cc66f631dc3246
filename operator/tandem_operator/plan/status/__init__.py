"""What a plan says in status: conditions, pools, policies."""
