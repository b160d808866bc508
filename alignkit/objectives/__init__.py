"""Losses as pure functions of log-probs; they import only torch."""
