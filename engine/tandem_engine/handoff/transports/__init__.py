"""How pages get from one worker to another."""
