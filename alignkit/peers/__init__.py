"""Other toolkits on the same recipe, for parity and for side-by-side speed."""
