"""The cut itself: a dense model and a plan in, a smaller model out."""
