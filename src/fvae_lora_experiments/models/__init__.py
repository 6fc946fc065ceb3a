"""Pretrained models and their heads."""
