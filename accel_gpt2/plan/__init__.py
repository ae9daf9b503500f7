"""What would happen: arithmetic on a recipe and a machine, without torch and without I/O."""
