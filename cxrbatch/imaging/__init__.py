"""From bytes to the model input: decoding and the one pixel policy."""
