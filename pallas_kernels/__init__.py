"""Low-bit matrix products: arrays in, arrays out. Knows nothing of `jaxq`."""
