"""Model definitions: one decoder whose differences between families are data."""
