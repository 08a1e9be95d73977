"""Checkpoints on disk: reading, writing, packing, provenance."""
