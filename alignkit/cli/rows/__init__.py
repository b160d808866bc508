"""Commands that look at files of rows, and make them."""
