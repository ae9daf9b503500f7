"""What exists: frozen rows with their sources, and no logic."""
