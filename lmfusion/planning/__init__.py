"""Memory, FLOPs, time and cost of a training run, calculated before it starts."""
