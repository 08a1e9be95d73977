"""The graph of stages, and walking it."""
