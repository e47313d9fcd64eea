"""What is computed and how it is run: dataclasses, their checks, and objects of the user's own files."""
