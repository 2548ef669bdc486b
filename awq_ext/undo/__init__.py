"""Undoing: a journal of every change to a model, Ctrl-C held until a safe moment, and the modes of the thread."""
