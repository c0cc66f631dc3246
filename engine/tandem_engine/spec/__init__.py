"""What a model is made of, as data, and how each family's config.json says it."""
