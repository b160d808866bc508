"""Adapters: attached, started, stored, switched, counted."""
