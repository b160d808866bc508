"""Weights: loading, adapters, packed attention, the vocabulary head, merging."""
