"""Pictures of cells and curves, from plain lists and numbers."""
