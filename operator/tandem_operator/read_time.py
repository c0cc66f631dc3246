"""Times as the API server writes them."""

from datetime import datetime


def read_time(text: str | None) -> datetime | None:
    """An RFC 3339 time, or None for none or for text that is no time."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
