"""Content encoders, towers, losses, metrics and the training loop: tensors in, tensors out; no database."""
