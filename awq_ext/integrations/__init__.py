"""Transformers, and other tools that look for us under names of their own."""
