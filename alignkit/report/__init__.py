"""Reads run folders: how a run was made, and its plan. No torch."""
