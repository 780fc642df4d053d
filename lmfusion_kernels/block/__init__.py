"""A whole two-tower decoder layer as one op."""
