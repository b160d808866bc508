"""alignkit: fine-tune and align open language models from a small YAML recipe."""

__version__ = "0.1.0"
