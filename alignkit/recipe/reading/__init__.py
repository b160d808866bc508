"""Reads files and overrides into a checked recipe."""
