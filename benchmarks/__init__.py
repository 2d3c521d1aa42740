"""What gradvar costs in seconds and bytes, measured."""
