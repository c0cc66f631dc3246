"""The engine core: one process per worker that schedules steps and runs them."""
