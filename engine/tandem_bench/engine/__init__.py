"""The engine's own steps, its start, its weights, and whether its tokens are right."""
