"""What the calibration text says of every layer: the texts, moments of the attention, scores, likeness of heads."""
