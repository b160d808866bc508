"""Packed batches to log-probs or scalars: scorers, and the choice between them."""
