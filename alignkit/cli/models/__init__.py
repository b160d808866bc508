"""Commands that open a model."""
