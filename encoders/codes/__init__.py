"""Content in a few bytes: one space for all modalities, codes of it, and the search over a long history by them."""
