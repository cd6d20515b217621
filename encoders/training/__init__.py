"""The training loop, its rows and optimiser, and checkpoints."""
