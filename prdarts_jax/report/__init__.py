"""What a person sees of finished runs: pictures, tables and one page."""
