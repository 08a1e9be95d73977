"""What a run tells people: rows, the model card."""
