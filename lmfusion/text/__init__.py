"""Text into token ids: tokenizers, chat templates, and conversations with images."""
