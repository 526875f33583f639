"""A photograph to the regions that a model is trained on: decoding, detectors, pooled features."""
