"""From a training set to a promoted generation, with its gates."""
