"""What a name means: bases, their configuration, identity and licence."""
