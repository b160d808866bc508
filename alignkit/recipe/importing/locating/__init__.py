"""Where the rows are that foreign files name, and which columns they have."""
