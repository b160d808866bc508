"""What is in a file of rows, before anything is trained on it."""
