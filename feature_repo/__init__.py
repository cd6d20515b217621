"""The feature repository: the contract of names, and the Feast objects over the platform's own tables."""
