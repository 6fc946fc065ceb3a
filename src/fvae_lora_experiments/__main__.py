"""The command `fvae-lora`."""

from fvae_lora_experiments import signals


def main() -> None:
    """Runs the command line, which Ctrl-C and SIGTERM end with one line from the first moment on."""
    signals.exit_on_signal()

    from fvae_lora_experiments import cli

    cli.main()


if __name__ == "__main__":
    main()
