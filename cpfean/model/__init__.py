"""The model: fragments of both modalities in, a score matrix out."""
