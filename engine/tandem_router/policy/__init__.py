"""Which decode worker gets a request, and which prefill workers it may ask."""
