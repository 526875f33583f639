"""All that touches MLflow."""
