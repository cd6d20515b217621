"""One question, one answer: where the interests come from, and the search."""
