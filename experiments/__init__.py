"""What to run: named configurations, search spaces, ablations, and the commands for them."""
