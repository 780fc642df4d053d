"""Image files: formats, safe decoding, preprocessing to tensors, PNG files with settings, and grids."""
