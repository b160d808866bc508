"""Files and overrides to a checked recipe."""
