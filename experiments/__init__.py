"""The paper's claims as programs, and searches of the user's own; `python -m experiments.NAME --help` says the rest."""
