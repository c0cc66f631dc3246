"""How many workers each pool should have: the policy's decision, the owners, the ratio."""
