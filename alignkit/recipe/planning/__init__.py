"""Recipe, rows and machine to a plan."""
