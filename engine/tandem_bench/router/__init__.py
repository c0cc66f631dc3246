"""What a router costs."""
