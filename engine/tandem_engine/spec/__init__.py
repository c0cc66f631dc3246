"""What a model family is made of, as data."""
