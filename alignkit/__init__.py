"""alignkit: fine-tune and align open language models from a small YAML recipe."""

import logging

__version__ = "0.2.0"

# At import it warns about a kernel that few processors can have.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
