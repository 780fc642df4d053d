"""Complete experiments built on the library: the demo and the ablation."""
