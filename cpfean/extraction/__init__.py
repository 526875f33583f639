"""From photographs to a data folder: in fixed batches, resumed, put together at the end."""
