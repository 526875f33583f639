"""What every training came to, on disk: the truth that resuming, tracking and tables start from."""
