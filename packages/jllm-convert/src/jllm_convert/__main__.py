"""Entry point of the command ``jllm-convert``, and of ``python -m jllm_convert``."""

import os
import signal


def main() -> None:
    """Run the command. Ctrl-C ends it without a word while its modules are imported, and with one from then on."""
    before = signal.getsignal(signal.SIGINT)
    # A shell's background job ignores Ctrl-C, and goes on doing so.
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from jllm_convert.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
