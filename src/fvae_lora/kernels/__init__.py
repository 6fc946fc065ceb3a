"""Fused forward and backward paths, each beside the plain one that it must equal."""
