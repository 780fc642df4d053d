"""What does each part of a design bring? The same training run in variants, measured alike, side by side."""
