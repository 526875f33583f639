"""Compiled reductions over the cosines of image-caption pairs; they know nothing but arrays."""
