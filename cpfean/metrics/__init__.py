"""Ranks, Recall@K and rSum."""
