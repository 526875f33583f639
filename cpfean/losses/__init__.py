"""Ranking losses over a score matrix."""
