"""Losses as pure functions over log-probs; nothing here but torch."""
