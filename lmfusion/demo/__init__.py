"""The whole chain on real data: adapt an LLM, train its image tower on digits, draw, caption, and prove the text unchanged."""
