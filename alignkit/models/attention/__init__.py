"""Attention over packed and cached rows, and the prefixes that rows read."""
