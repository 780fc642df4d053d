"""The image path: files to pixels (preprocessing), pixels to latents (codec), latents to rows of the image tower
(patch coder)."""
