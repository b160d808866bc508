"""What every run has: session, loop, steps, run folder, end."""
