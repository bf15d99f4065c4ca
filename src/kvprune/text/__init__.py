"""Named corpora and files -> batches of token ids."""
