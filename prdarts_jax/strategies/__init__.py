"""Search methods: each one a NamedTuple of pure functions and a row in the registry."""
