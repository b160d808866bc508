"""Stages that learn from rows."""
