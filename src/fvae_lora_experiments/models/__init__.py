"""Pretrained models of others, and their heads."""
