"""The live generation's item vectors in memory: filters, search, merges."""
