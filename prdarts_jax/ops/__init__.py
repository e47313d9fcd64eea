"""Leaf operations: depthwise and pointwise convolutions, normalisation, pooling, and the primitives made of them."""
