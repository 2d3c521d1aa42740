"""The `gradvar` command: parse, call one stage, render."""
