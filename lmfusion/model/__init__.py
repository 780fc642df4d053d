"""The two-tower model: its layers, configuration, batches, image codec, and how it is saved and loaded."""
