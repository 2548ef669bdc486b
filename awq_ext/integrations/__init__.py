"""Integrations: Transformers, and tools that look for us under names of their own."""
