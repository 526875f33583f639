"""Folders and object stores: checkpoints, and the copy of the records."""
