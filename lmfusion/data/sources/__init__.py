"""Data sources, one file for each kind, and the file formats they share."""
