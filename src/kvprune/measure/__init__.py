"""What a model costs and what it is worth: perplexity, cache bytes, memory, and the tables that show them."""
