"""What a choice would change, measured before it is made: one file a study."""
