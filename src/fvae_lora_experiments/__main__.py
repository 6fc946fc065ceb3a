"""The command `fvae-lora`."""

from fvae_lora_experiments import signals


def main() -> None:
    """Runs the command line; from the very start Ctrl-C and SIGTERM end it with one line."""
    signals.exit_on_signal()

    from fvae_lora_experiments import cli

    cli.main()


if __name__ == "__main__":
    main()
