"""KV from one worker to another, in two processes on this machine."""
