"""Makes a plan from the recipe, the rows and the machine."""
