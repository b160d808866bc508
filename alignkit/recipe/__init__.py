"""What the user asked for: schema, loader, planner. Nothing here imports torch."""
