"""The training of a derived network, and its evaluation."""
