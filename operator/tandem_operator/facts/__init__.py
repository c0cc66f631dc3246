"""What the operator knows about one service at one moment: frozen values, no decisions."""
