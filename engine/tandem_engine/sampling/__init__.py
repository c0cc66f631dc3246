"""From logits to tokens: penalties, filters, and a random number that depends on nothing else."""
