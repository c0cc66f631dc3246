"""The hand-off: decode-led, leased, fenced movement of KV pages between workers."""
