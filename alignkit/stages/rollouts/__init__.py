"""Sampling with rewards: what PPO and its relatives share."""
