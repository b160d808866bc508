"""All that happens before weights are loaded."""
