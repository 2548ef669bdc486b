"""What can take over 1/s, and the numeric proof that nothing else changes."""
