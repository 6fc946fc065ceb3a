"""Data sets in the layouts that they were published in."""
