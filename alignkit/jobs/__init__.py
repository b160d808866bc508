"""What is done with finished models: merge, export, evaluate, label."""
