"""Ways in which a model answers; run in one process, and by several as a program.

python -m tests.sharding.ways CONVERTED BLIP2 OUT HOST:PORT PROCESSES PROCESS
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import catp_jax
from catp_jax.generation.options import Options
from catp_jax.pruning import CATP, TrimmedLlama
from catp_jax.sharding.distributed import gathered, is_first, start
from catp_jax.study.journal import Journal
from catp_jax.study.records import Conditions, Setting
from catp_jax.study.sweep import sweep
from catp_jax.study.tasks import easy_vqa

ASSETS = Path(catp_jax.__file__).parent / "assets"
CIRCLE = ASSETS / "blue-circle.png"
PROMPTS = ["what color is the shape?", "what shape is present?", "is there a triangle?"]


def answer(converted: Path, folder: Path, journal: Path, is_spread: bool) -> dict[str, Any]:
    """What a converted Llama Vision answers, in a study too, and what a BLIP-2 draws.

    A batch of three is one that no axis divides.
    """
    llama = catp_jax.load(converted, mesh="data=2,fsdp=4" if is_spread else None)
    blip2 = catp_jax.load(folder, mesh="fsdp=4,tensor=2" if is_spread else None)
    trimmed, found = TrimmedLlama(keep=64), {"says": [llama.describe(), blip2.describe()]}
    for name, model, pruner, options in (
        ("beams", llama, trimmed, {"num_beams": 3}),
        ("auto", llama, TrimmedLlama(keep=None, k_ratio=0.05), {}),
        ("drawn", blip2, CATP(keep=8), {"temperature": 0.7, "seed": 3}),
    ):
        out = model.generate([CIRCLE] * 3, PROMPTS, [pruner], max_new_tokens=3, **options)
        kept = [np.asarray(one.number).tolist() for one in out.kept]
        found[name] = [out.text, out.tokens, kept]
    results = list(
        sweep(
            llama,
            list(easy_vqa("test", limit=6)),  # about one image, as above, and as many at a time
            [Setting("trimmed_llama", 64)],
            Conditions(batch=3, options=Options(max_new_tokens=3, num_beams=3)),
            journal=Journal(journal, is_written=is_first()),
            pictured=[1],
        )
    )
    found["map"] = np.asarray(results[1].maps[1]).tolist()
    found["study"] = [[answer.text for answer in result.answers] for result in results]
    return found


def main() -> None:
    """One of several processes: writes OUT-PROCESS.json, and the study's file OUT.jsonl."""
    converted, folder, out, coordinator, processes, process = sys.argv[1:]
    start(coordinator, int(processes), int(process), heartbeat=20)
    found = answer(Path(converted), Path(folder), Path(f"{out}.jsonl"), is_spread=True)
    found["gathered"] = gathered(f"process {process} says " + "é" * int(process))
    Path(f"{out}-{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
