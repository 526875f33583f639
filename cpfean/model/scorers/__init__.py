"""Scorers of the fragments of images and captions: one a file, named by `registry`."""
