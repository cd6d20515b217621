"""How each feature view is read online, read at a moment, and written."""
