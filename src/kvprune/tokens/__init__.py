"""Online: anchors, fusion, threshold, cache, filter."""
