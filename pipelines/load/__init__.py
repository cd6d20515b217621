"""From the files of the input contract to typed tables."""
