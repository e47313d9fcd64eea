"""A search from its config to its genotype, alone or as one of a population."""
