"""The layout of a packed batch: which tower handles a token, and which keys it sees."""
