"""gradvar."""
