"""Files as rows of plain values, one after another, each with its place."""
