"""Files of llama.cpp: their names and metadata for the architectures that are known here, written and read."""
