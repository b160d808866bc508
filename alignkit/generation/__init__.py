"""Text from models, seeded."""
