"""GRPO and its family: responses measured against their group."""
