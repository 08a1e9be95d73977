"""The path of activations through a model, one block at a time."""
