"""The shared ground of weightworks: checkpoints, streaming, stages, engines. It never names a method."""

__version__ = "0.1.0"
