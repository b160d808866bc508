"""Other toolkits run on the same recipe, to compare results and speed."""
