"""The image path: files to pixels (preprocessing), to latents (codec), to rows of the image tower (patch_coder)."""
