"""One run: its trainer, its record and folder, and what surrounds it."""
