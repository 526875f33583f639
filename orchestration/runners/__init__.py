"""Where trials are trained: on Ray, or in this process."""
