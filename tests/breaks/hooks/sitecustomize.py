"""Python imports this at start-up in every process whose PYTHONPATH names the folder."""

import os

if "BREAKS_RECORD" in os.environ:
    import measuring

    measuring.start()
