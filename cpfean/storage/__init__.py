"""Checkpoints in folders and object stores alike."""
