"""What serves a pruned folder outside Python: files for other engines, and what each of them can take."""
