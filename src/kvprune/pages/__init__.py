"""`report`: what was done to a model and what came of it, as one page that needs nothing else to be read."""
