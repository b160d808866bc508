"""Weights: loading, adapters, packed attention, the vocabulary head, merging."""

import logging

# peft imports bitsandbytes, which warns about a kernel that few processors can have.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
