"""Inputs that people get wrong, as tables: what is typed, and what must be answered."""
