"""Rows of one format -> rows of another, without loss or with the loss counted."""
