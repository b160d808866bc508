"""The recipe of each stage, and all that other rooms ask about it."""
