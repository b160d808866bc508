"""Weights on disk: shards, streaming, writing, rounding, comparing."""
