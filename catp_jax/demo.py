"""The demo: the shipped mini Llama Vision answers questions about images, unpruned and pruned."""

import importlib.resources
from collections import defaultdict
from pathlib import Path

from rich.console import Console

from catp_jax import api
from catp_jax.study import report, tasks
from catp_jax.study.pictures import Panel, draw_kept
from catp_jax.study.sweep import UNPRUNED, Result, Setting, sweep

BUDGETS = (4, 16, 64, 130)
SETTINGS = [
    Setting(method, keep)
    for method in ("trimmed_llama", "fastv", "k_norm", "random")
    for keep in BUDGETS
]
EACH = 4  # questions about one image
PICTURED = "trimmed_llama"


def mini_llama_vision() -> Path:
    """The folder of the mini checkpoint that comes with this package."""
    return Path(str(importlib.resources.files("catp_jax"))) / "assets" / "mini-llama-vision"


def run(model_folder: Path | None, out: Path, questions: int, console: Console) -> None:
    """Answers `questions` of easy-VQA's test set and writes the figures to `out`.

    Raises ValueError if `out` is a file or the model cannot be loaded.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the demo's figures")
    model = api.load(model_folder or mini_llama_vision())
    examples = spread_out(list(tasks.easy_vqa("test")), questions)
    out.mkdir(parents=True, exist_ok=True)

    results = []
    with console.status("reading images") as status:
        for result in sweep(
            model,
            examples,
            SETTINGS,
            report=status.update,
        ):
            results.append(result)
        status.update("drawing")
        report.draw_accuracy(results, out / "accuracy.png")
        draw_examples(model, examples, results, out / "kept.png")
    report.write_json_lines(results, out / "results.jsonl")
    console.print(report.table(results))
    console.print(f"written: {out / 'accuracy.png'}, {out / 'kept.png'}, {out / 'results.jsonl'}")


def spread_out(examples: list[tasks.Example], number: int) -> list[tasks.Example]:
    """`number` examples, up to `EACH` about one image, the images at even distances.

    An image is encoded once for all its questions in a batch.
    """
    if not 1 <= number <= len(examples):
        raise ValueError(f"the demo takes 1 to {len(examples)} questions, got {number}")
    groups: dict[int, list[tasks.Example]] = defaultdict(list)
    for example in examples:
        groups[example.image_id].append(example)
    each = max(EACH, -(-number // len(groups)))
    while sum(min(each, len(group)) for group in groups.values()) < number:
        each += 1
    images, picked = list(groups.values()), []
    step = max(1, len(images) * each // (number + each))
    for group in [*images[::step], *(g for n, g in enumerate(images) if n % step)]:
        wanted = min(each, len(group))
        picked += [group[index * len(group) // wanted] for index in range(wanted)]
    return picked[:number]


def draw_examples(
    model: api.Model, examples: list[tasks.Example], results: list[Result], path: Path
) -> None:
    """What Trimmed Llama kept of three images, and what was answered."""
    first = {e.image_id: number for number, e in reversed(list(enumerate(examples)))}
    numbers = sorted(first.values(), key=lambda n: examples[n].question.startswith("wh"))[-3:]
    shown = [r for r in results if r.setting.method in (UNPRUNED, PICTURED)]
    rows = []
    for number in numbers:
        image = model.process_image(examples[number].image)
        rows.append(
            [
                Panel(
                    image=image,
                    kept=result.kept[number],
                    caption=f"{examples[number].question}\nall: {result.answers[number]}"
                    if result.kept[number] is None
                    else f"kept {result.setting.keep}: {result.answers[number]}",
                )
                for result in sorted(shown, key=lambda r: -r.visual_tokens)
            ]
        )
    draw_kept(rows, model.config.vision, path)
