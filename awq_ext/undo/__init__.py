"""The way back: a journal of every change to a model, Ctrl-C held until a safe moment, the modes of the thread."""
