"""The README beside a mini model of scenes, its figures from the run itself."""

from typing import Any

from catp_jax.training.scene_questions import FAMILIES

CARD = """# {title}

{what} of {millions:.1f} million parameters (`{kind}` in `transformers`), trained from random
weights on generated scenes: 6 to 10 objects and digits on textured ground, questions of five
families. It is there to study which visual tokens an answer needs; it knows nothing else.

    catp-jax study {name} --task scenes --prune random --keep 25%

## Accuracy on {scenes:,} test scenes

| questions | right |
|---|---|
{rows}

## Training

    make train

or, in an environment with `catp-jax[demo]`,

    python -m catp_jax.training.{module} {options}

{minutes:.0f} minutes of steps; a run that is cut off resumes when started again. Figures are in
`training_log.jsonl`, the last line is the test. `catp_jax/training/{module}.py` says what each
stage is for: {stages}.
"""


def card(
    title: str,
    what: str,
    kind: str,
    parameters: int,
    module: str,
    command: dict[str, Any],
    steps: dict[str, int],
    figures: dict[str, float],
) -> str:
    """The README's text. `command` are the options that make the model again, `steps` how many each
    stage took, `figures` what `evaluate` said, with "scenes" and "minutes of training".
    """
    rows = (
        f"| {'' if name in FAMILIES else '… '}{name} | {100 * figures[name]:.1f} % |"
        for family in FAMILIES
        for name in sorted(figures)
        if name == family or name.startswith(f"{family}, ")
    )
    return CARD.format(
        title=title,
        what=what,
        kind=kind,
        millions=parameters / 1e6,
        name=command["out"],
        scenes=int(figures["scenes"]),
        rows="\n".join(rows),
        module=module,
        options=" ".join(f"--{name} {value}" for name, value in command.items()),
        minutes=figures["minutes of training"],
        stages=", ".join(f"*{stage}* ({count:,} steps)" for stage, count in steps.items()),
    )
