"""Linears that stand in for layers whose weights have another form, and the way back."""
