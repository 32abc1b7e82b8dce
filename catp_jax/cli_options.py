"""What commands say of generation's options, `generate` and `study` alike. The options themselves,
and the rules among them, are `generation.options.Options`.
"""

import dataclasses
from typing import Any

import typer

NAMES = {
    "num_beams": "beams",
    "bad_words": "bad_word",
    "suppress_tokens": "suppress_token",
    "begin_suppress_tokens": "begin_suppress_token",
    "stop_strings": "stop",
}
"""Options that commands call otherwise than Python does."""

MAX_NEW_TOKENS = typer.Option(help="Longest answer, in tokens.")
MIN_NEW_TOKENS = typer.Option(help="Shortest answer, in tokens.")
BEAMS = typer.Option(help="Search this many answers at a time for the likeliest; 1: no search.")
LENGTH_PENALTY = typer.Option(
    help="Beam search: above 0 favours long answers, 0 does not look at length."
)
EARLY_STOPPING = typer.Option(
    help="Beam search ends when no better answer is likely, with the first --beams answers, or "
    "when none could be better."
)
TEMPERATURE = typer.Option(help="0 is greedy; above, answers vary.")
TOP_K = typer.Option(help="Draw from this many tokens; 0: all.")
TOP_P = typer.Option(help="Draw from this share of probability.")
SEED = typer.Option(help="Prompt or line i draws with seed + i, from 0.")
REPETITION_PENALTY = typer.Option(
    help="Above 1, what the prompt or the answer has already is less likely."
)
NO_REPEAT_NGRAM_SIZE = typer.Option(
    help="Of this many tokens in succession none stand twice; 0: they may."
)
BAD_WORD = typer.Option(help="A word that is not written; repeat it for several.")
SUPPRESS_TOKEN = typer.Option(help="The number of a token that is not written; repeat it.")
BEGIN_SUPPRESS_TOKEN = typer.Option(help="The same, of a token that no answer begins with.")
STOP = typer.Option(help="A text that ends an answer; repeat it for several.")
LOGPROBS = typer.Option(
    help="With --json: the log-probability of each token, and of so many likely ones beside it."
)
GENERATION_CONFIG = typer.Option(
    "--generation-config/--no-generation-config",
    help="Options that are not given are those of the checkpoint's generation_config.json, which "
    "may ask for sampling.",
)


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """The options among a command's parameters, by their names in Python, where they are given."""
    from catp_jax.generation.options import Options  # here, so that --help does not wait for it

    values = {
        field.name: parameters.get(NAMES.get(field.name, field.name))
        for field in dataclasses.fields(Options)
    }
    return {name: value for name, value in values.items() if value not in (None, (), [])}
