"""What rankers read of candidates: features and similarities."""
