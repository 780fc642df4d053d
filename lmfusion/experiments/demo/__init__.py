"""The whole chain on real data: adapt an LLM, train on digits, draw, caption, prove the text unchanged."""
