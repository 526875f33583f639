"""What to run: named configurations, search spaces and ablations, and the commands that run them."""
