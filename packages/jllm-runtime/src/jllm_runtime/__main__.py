"""Entry point of the command ``jllm``, and of ``python -m jllm_runtime``."""

import os
import signal


def main() -> None:
    """Run the command. Ctrl-C ends it without a word while its modules are imported, and with one from then on."""
    # A shell's background job ignores Ctrl-C, and goes on doing so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from jllm_runtime.cli import main as run

    run()


if __name__ == "__main__":
    main()
