"""A small language model that ships with the package, and ``awq-ext demo``, which quantizes it."""
