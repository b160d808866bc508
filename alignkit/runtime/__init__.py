"""Devices, optimizers, checkpoints, metrics, progress."""
