"""Adapters into dense weights, verified."""
