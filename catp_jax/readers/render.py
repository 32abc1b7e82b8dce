"""Renders chat templates, a line of JSON in, a line of JSON out: the program that `templates` runs
beside us, since a template is a program that a checkpoint brings, and need not end.
"""

import json
import signal
import sys
from contextlib import suppress

MOST = 2**32  # bytes of memory
LONGEST = 4_000_000  # characters, more than any model reads


def main(seconds: float) -> None:
    """Answers requests until there are no more; ends itself where one takes longer than `seconds`,
    which also stops what Python cannot interrupt.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(ImportError, ValueError, OSError):  # where there are no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    answers, sys.stdout = sys.stdout, sys.stderr
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            (text,), _ = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=True,
                **request["tokens"],
            )
            if len(text) > LONGEST:
                raise ValueError(f"it makes a text of {len(text)} characters")
            answer = {"text": text}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
