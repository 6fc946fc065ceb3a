"""FVAE-LoRA on stock peft."""
