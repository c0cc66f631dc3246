"""Reads facts from the API server, the workers and the routers; decides nothing."""
