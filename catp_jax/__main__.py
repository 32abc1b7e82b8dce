"""`python -m catp_jax` is the command `catp-jax`."""

from catp_jax.cli import main

main()
