"""Several processes that quantize one model together: who they are, what they send, and how all end when one does."""
