"""Training an autoencoder for the image side: pixels to latents and back."""
