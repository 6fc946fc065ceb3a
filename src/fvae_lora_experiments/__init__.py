"""Where the command `fvae-lora` begins: beside `fvae_lora`, whose import takes seconds that can be interrupted, too."""
