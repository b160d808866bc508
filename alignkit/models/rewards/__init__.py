"""Scalar heads and classifiers."""
