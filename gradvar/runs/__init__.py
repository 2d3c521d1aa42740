"""The run directory: records, reading and writing, provenance."""
