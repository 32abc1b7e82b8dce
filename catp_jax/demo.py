"""The demo: the shipped mini Llama Vision answers questions about images, unpruned and pruned."""

import importlib.resources
from pathlib import Path

from rich.console import Console

from catp_jax import api
from catp_jax.pruning import make
from catp_jax.study import report, tasks
from catp_jax.study.pictures import Panel, draw_kept
from catp_jax.study.sweep import Setting, sweep

SETTINGS = [
    Setting(method, keep)
    for method, budgets in {
        "trimmed_llama": (4, 16, 64, 130),
        "fastv": (4, 16, 64),
        "k_norm": (16, 64),
        "random": (4, 16, 64, 130),
    }.items()
    for keep in budgets
]
PICTURED = (64, 16, 4)  # budgets of the pictures


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
    with console.status("answering unpruned") as status:
        for result in sweep(
            model,
            examples,
            SETTINGS,
            report=lambda s: status.update(f"answering with {s.method}, keep {s.keep}"),
        ):
            results.append(result)
        status.update("drawing")
        report.draw_accuracy(results, out / "accuracy.png")
        draw_examples(model, examples, out / "kept.png")
    report.write_json_lines(results, out / "results.jsonl")
    console.print(report.table(results))
    console.print(f"written: {out / 'accuracy.png'}, {out / 'kept.png'}, {out / 'results.jsonl'}")


def spread_out(examples: list[tasks.Example], number: int) -> list[tasks.Example]:
    """`number` examples at even distances, so that they are about many images."""
    if not 1 <= number <= len(examples):
        raise ValueError(f"the demo takes 1 to {len(examples)} questions, got {number}")
    return [examples[index * len(examples) // number] for index in range(number)]


def draw_examples(model: api.Model, examples: list[tasks.Example], path: Path) -> None:
    """What Trimmed Llama kept of three images, and what was answered."""
    distinct = {example.image_id: example for example in examples}
    wh = [example for example in distinct.values() if example.question.startswith("wh")]
    chosen = (wh + list(distinct.values()))[:3]
    images = [example.image for example in chosen]
    prompts = [example.question for example in chosen]
    seen = [model.process_image(image) for image in images]
    full = model.generate(images, prompts, max_new_tokens=4)
    rows = [
        [Panel(image=image, kept=None, caption=f"{prompt}\n{text} (all {number})")]
        for image, prompt, text, number in zip(
            seen, prompts, full.text, full.available, strict=True
        )
    ]
    for keep in PICTURED:
        pruner = make("trimmed_llama", keep, model.sites)
        out = model.generate(images, prompts, [pruner], max_new_tokens=4)
        for row, image, text, kept in zip(rows, seen, out.text, out.kept or [], strict=True):
            row.append(Panel(image=image, kept=kept, caption=f"{text}\nkept {keep}"))
    draw_kept(rows, model.config.vision, path)
