"""Forwards of the user's model: its calls, what goes in and comes out, and many batches in lockstep."""
