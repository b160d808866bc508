"""One file a command; thin. torch is imported inside the functions."""
