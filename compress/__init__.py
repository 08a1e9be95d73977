"""Compression of checkpoints: ``from compress import quantize``."""
