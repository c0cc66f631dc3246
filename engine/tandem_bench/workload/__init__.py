"""What is sent: arrivals, lengths, prompts, traces."""
