"""The loops that run methods over checkpoints."""
