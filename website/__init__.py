"""How the documentation becomes a site, and what is checked of it."""
