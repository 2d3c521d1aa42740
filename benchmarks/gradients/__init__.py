"""gradvar's score Grams against other ways to the same Grams: CPU time, memory, error. `python -m benchmarks.gradients`."""
