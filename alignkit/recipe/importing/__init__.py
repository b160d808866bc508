"""Configurations of other toolkits -> recipes."""
