"""What the user asked for: schema, loader and planner. No torch."""
