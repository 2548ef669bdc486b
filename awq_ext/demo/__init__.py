"""A language model that fits in the package, and a demonstration of quantizing it: ``awq-ext demo``."""
