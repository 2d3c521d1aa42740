"""Other ways to the same score Grams beside ours: CPU time, memory, error. `python -m benchmarks.gradients`."""
