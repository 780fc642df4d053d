"""The demo and the ablation: complete experiments built on the library."""
