"""The router: text in, tokens to workers, text out."""
