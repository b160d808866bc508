"""Rows -> token ids with masks -> PackedBatch. Numbers only, no models."""
