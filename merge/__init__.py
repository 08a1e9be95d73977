"""Merging of checkpoints. Its methods come with the merge engine."""
