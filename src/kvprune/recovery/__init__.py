"""Training after pruning: LoRA on a pruned folder, merged into the same kind of folder."""
