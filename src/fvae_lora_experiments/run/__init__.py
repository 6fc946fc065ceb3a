"""One run: its trainer, its record, its folder and its environment."""
