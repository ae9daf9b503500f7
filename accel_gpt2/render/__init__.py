"""What to write: rows and plans as text for the programs that read them; no file is touched."""
