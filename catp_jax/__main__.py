"""`python -m catp_jax` is the command `catp-jax`."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Starts the command; a package that is missing is named, with what to do."""
    before = signal.signal(signal.SIGINT, _interrupted)
    try:
        from catp_jax.cli import main as command

        command()
    except ModuleNotFoundError as error:
        if error.name is None:  # one of ours, which says more
            sys.exit(f"catp-jax: {error}")
        package = error.name.partition(".")[0]
        sys.exit(f"catp-jax: the package {package} is missing: pip install catp-jax")
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(signal_: int = 0, frame: FrameType | None = None) -> None:
    """Ends at once: an exception would be lost where it meets an import or JAX's own callbacks.
    Commands that have something to tidy up ask for one (`cli_study.interruptible`).
    """
    os.write(2, b"catp-jax: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
