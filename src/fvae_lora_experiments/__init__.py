"""Experiments with FVAE-LoRA: recipes, runs, records, reports, the command line (extra: ``fvae-lora[experiments]``)."""
