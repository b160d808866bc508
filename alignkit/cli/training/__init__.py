"""Commands that read a recipe or a run."""
