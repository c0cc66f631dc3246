"""The life of a request: admission, placement, streaming, re-submission, the end."""
