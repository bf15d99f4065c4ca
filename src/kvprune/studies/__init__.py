"""Many prunes and what their spread says: one file a study."""
