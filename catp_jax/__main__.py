"""`python -m catp_jax` is the command `catp-jax`."""

import sys


def main() -> None:
    """Starts the command; a package that is missing is named, with what to do."""
    try:
        from catp_jax.cli import main as command

        command()
    except ModuleNotFoundError as error:
        if error.name is None:  # one of ours, which says more
            sys.exit(f"catp-jax: {error}")
        package = error.name.partition(".")[0]
        sys.exit(f"catp-jax: the package {package} is missing: pip install catp-jax")


if __name__ == "__main__":
    main()
