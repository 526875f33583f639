"""What is tried next: search spaces, and Optuna that draws from them."""
