"""The survey: what one forward shows of a model, its blocks, scale groups and experts."""
