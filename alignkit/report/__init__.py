"""Run folders, as they are read: what made a run, and what it planned. No torch."""
