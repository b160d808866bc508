"""Several stages and jobs, one after another."""
