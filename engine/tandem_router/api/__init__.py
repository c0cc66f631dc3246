"""The HTTP surface: request validation, reply formats, endpoints."""
