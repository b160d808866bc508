"""The recipe class of each stage, with the traits that other rooms read."""
