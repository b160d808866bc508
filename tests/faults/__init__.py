"""Faults on tiny runs: killed, damaged, out of space; and then resumed, to the same bytes.

`python -m tests.faults --count 200 --seed 1` makes many of them and prints what became of each.
"""
