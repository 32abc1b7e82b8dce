"""The adapter for lmms-eval, with the package where it is installed."""

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catp_jax.answers import NonFinite
from tests.evaluation import stand_ins
from tests.evaluation.stand_ins import HAS_LMMS_EVAL, module
from tests.shallow import ASSETS, shallow

CatpJax = module("catp_jax.evaluation.lmms_eval").CatpJax
Instance = module("lmms_eval.api.instance").Instance
CIRCLE = Image.open(ASSETS / "blue-circle.png").convert("RGB")
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90), (0, 0, 0)]
DOCS = [
    {"images": [Image.new("RGB", (64, 64), color)], "question": f"is there a {thing}?"}
    for color, thing in zip(
        COLORS, ["circle", "square", "shape", "rectangle", "triangle"], strict=True
    )
]
SHORT: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0, "do_sample": False, "top_p": 1.0}
LONG: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "until": ["e", "o"]}
needs_lmms_eval = pytest.mark.skipif(not HAS_LMMS_EVAL, reason="lmms-eval is not installed")


def images_of(doc: dict[str, Any]) -> Any:
    return doc["images"]


def request(doc: int, second: Any, bring: Any = images_of, kind: str = "generate_until") -> Any:
    return Instance(
        request_type=kind,
        arguments=(DOCS[doc]["question"], second, bring, doc, "shapes", "test"),
        idx=0,
        metadata={"task": "shapes", "doc_id": doc, "repeats": 1},
    )


def scored(lm: Any, asked: list[Any]) -> list[Any]:
    return [one.text for one in lm.loglikelihood(asked)]


@pytest.fixture(scope="module")
def lm() -> Any:
    model = CatpJax(
        pretrained=shallow("mini-llama-vision"),
        batch_size="2",
        device="cuda:0",
        max_batch_size=None,
        prune="uniform",
        keep="50%",
    )
    model.task_dict = {"shapes": {"test": DOCS}}
    return model


def ours(lm: Any, **options: Any) -> Any:
    images, prompts = [doc["images"] for doc in DOCS], [doc["question"] for doc in DOCS]
    return lm.evaluated.model.generate(images, prompts, prune="uniform", keep="50%", **options)


def test_answers_are_in_order_whatever_is_asked_together(lm: Any):
    asked = [request(doc, options) for doc in range(5) for options in (SHORT, LONG)]
    short = ours(lm, max_new_tokens=3).text
    whole = ours(lm, max_new_tokens=5, min_new_tokens=5).text
    long = [text.replace("o", "e").partition("e")[0] for text in whole]
    assert any(text != some for text, some in zip(whole, long, strict=True))
    expected = [text for pair in zip(short, long, strict=True) for text in pair]
    assert lm.generate_until(asked) == expected
    assert lm.generate_until(asked[::-1]) == expected[::-1]


def test_losses_are_of_the_answers_and_the_likeliest_has_the_least(lm: Any):
    tokenizer = lm.evaluated.model.reader.tokenizer
    choices = [" yes", " no", " red"]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in choices]
    assert [len(one) for one in tokens] == [1, 1, 1]
    logits = ours(lm, max_new_tokens=3).logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    asked = [request(doc, text, kind="loglikelihood") for doc in range(3) for text in choices]
    found = scored(lm, asked)
    for number, (loss, is_greedy) in enumerate(found):
        doc, (token,) = number // 3, tokens[number % 3]
        assert loss == pytest.approx(-logprobs[doc, token], abs=1e-4)
        assert is_greedy == (token == logits[doc].argmax())


def test_a_perplexity_is_of_log_probabilities(lm: Any):
    """Answers that are functions of documents are those of tasks of the kind `loglikelihood`."""
    text = " no red"
    asked = [request(1, answer, kind="loglikelihood") for answer in (text, lambda doc: text)]
    (loss, one), (total, other) = scored(lm, asked)
    assert total == pytest.approx(-2 * loss, abs=1e-5)
    assert total < 0
    assert one == other


def test_the_choices_of_a_document_share_its_images(lm: Any):
    brought = []

    def bring(doc: Any) -> Any:
        brought.append(doc["question"])
        return images_of(doc)

    asked = [
        request(doc, text, bring, kind="loglikelihood") for doc in (3, 4) for text in (" a", " b")
    ]
    scored(lm, asked)
    assert brought == [DOCS[3]["question"], DOCS[4]["question"]]


def test_an_answer_that_cannot_be_scored_costs_no_other(lm: Any, monkeypatch: pytest.MonkeyPatch):
    asked = [request(doc, text, kind="loglikelihood") for doc in (0, 1) for text in (" no", " red")]
    expected = scored(lm, asked)
    empty = [asked[0], request(0, "", kind="loglikelihood"), *asked[2:]]
    with pytest.warns(UserWarning, match="request 1 got no answer: the answer is empty"):
        found = scored(lm, empty)
    assert found[1] == (math.inf, False)
    for number in (0, 2, 3):
        assert found[number] == pytest.approx(expected[number], abs=1e-5)

    # the first of a batch, with which short ones are filled up
    model, plain = lm.evaluated.model, lm.evaluated.model.likelihoods

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def likelihoods(self, questions: Any, answered: Any, **options: Any) -> Any:
            if bad := [place for place, one in enumerate(answered) if one.begun == " no"]:
                raise NonFinite(bad)
            return plain(questions, answered, **options)

    monkeypatch.setattr(lm.evaluated, "model", Broken())
    with pytest.warns(UserWarning, match="got no answer: the model's logits are not finite"):
        found = scored(lm, [*asked[:2], asked[2]])
    assert found[0] == found[2] == (math.inf, False)
    assert found[1] == pytest.approx(expected[1], abs=1e-5)


def test_what_the_model_cannot_answer_says_why_and_costs_no_other():
    lm = CatpJax(pretrained=str(shallow("mini-blip2-opt")), batch_size=2)
    lm.task_dict = {"shapes": {"test": DOCS}}
    asked = [request(0, SHORT), request(1, SHORT, lambda doc: [CIRCLE, CIRCLE])]
    asked += [request(2, SHORT, lambda doc: None), request(3, SHORT)]
    with pytest.warns(UserWarning, match="got no answer: .* one image with each prompt, got"):
        first, two, none, last = lm.generate_until(asked)
    assert two.startswith("[no answer: ")
    assert two.endswith("takes one image with each prompt, got 2]")
    assert none.endswith("got 0]")
    assert "no answer" not in first + last
    choices = [request(n, " no", asked[n].args[2], kind="loglikelihood") for n in range(2)]
    choices.append(Instance("loglikelihood", ("", " no"), 0, choices[0].metadata))
    with pytest.warns(UserWarning, match="got no answer"):
        (loss, _), *others = scored(lm, choices)
    assert math.isfinite(loss)
    assert others == [(math.inf, False)] * 2


def test_a_task_of_several_rounds_is_refused(lm: Any):
    with pytest.raises(NotImplementedError, match="one round"):
        lm.generate_until_multi_round([])


def test_a_method_that_does_not_fit_the_model_is_refused_at_once():
    with pytest.raises(ValueError, match="l2 prunes a place that this model does not have"):
        CatpJax(pretrained=shallow("mini-llama-vision"), prune="l2", keep=8)


def test_several_methods_are_said_with_a_plus():
    settings = {"prune": "l2+fastv", "keep": "16+8", "batch_size": 1}
    lm = CatpJax(pretrained=shallow("mini-blip2-opt"), **settings)
    assert (lm.evaluated.prune, lm.evaluated.keep) == ("l2,fastv", "16,8")


def test_the_manifest_names_a_class_that_is_there():
    manifest = module("catp_jax.evaluation").lmms_eval_manifest()
    path, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(module(path), name) is CatpJax
    assert (manifest.model_id, CatpJax.is_simple) == ("catp_jax", True)


@needs_lmms_eval
def test_stand_ins_have_the_shape_of_what_they_stand_for():
    model, registry = module("lmms_eval.api.model"), module("lmms_eval.models.registry_v2")
    assert model.lmms.__abstractmethods__ == stand_ins.Lmms.__abstractmethods__
    real, own = CatpJax.__mro__[1], stand_ins.Lmms
    assert real is model.lmms
    for name in ("rank", "is_simple"):
        assert hasattr(real, name)
        assert hasattr(own, name)
    fields = [field.name for field in dataclasses.fields(Instance)]
    assert fields[:4] == [field.name for field in dataclasses.fields(stand_ins.Instance)]
    assert request(0, SHORT).args == request(0, SHORT).arguments
    instances = module("lmms_eval.api.instance")
    pair = (0.5, True)  # what `loglikelihood` wraps comes out as it was
    assert instances.unwrap_generation_output(instances.GenerationResult(text=pair))[0] == pair
    manifest = [field.name for field in dataclasses.fields(registry.ModelManifest)]
    assert manifest == [field.name for field in dataclasses.fields(stand_ins.ModelManifest)]


@needs_lmms_eval
def test_the_prompt_that_the_page_shows_is_read_as_it_stands():
    page = (Path(__file__).resolve().parents[2] / "docs" / "studies.md").read_text()
    (shown,) = re.findall(r"--model_args '([^']*)'", page)
    found = module("lmms_eval.utils").simple_parse_args_string(shown)
    assert found["prompt"] == "Question: {question} Short answer:"


@needs_lmms_eval
def test_lmms_eval_runs_tasks_with_the_model_found_by_its_entry_point(tmp_path: Path, lm: Any):
    """Two tasks of its own, of the two kinds of request, by its own evaluator."""
    rows = []
    for number, doc in enumerate(DOCS[:3]):
        doc["images"][0].save(tmp_path / f"{number}.png")
        row = {"image": str(tmp_path / f"{number}.png"), "question": doc["question"]}
        rows.append(row | {"answer": "yes", "gold": 1, "choices": ["yes", "no"]})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\n"
        "def images(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n"
        "def text(doc, *_, **__):\n    return doc['question']\n"
    )
    shared = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/test.jsonl
test_split: test
doc_to_visual: !function utils.images
doc_to_text: !function utils.text
"""
    (tmp_path / "shapes_said.yaml").write_text(
        f"""task: shapes_said
{shared}output_type: generate_until
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
    )
    (tmp_path / "shapes_chosen.yaml").write_text(
        f"""task: shapes_chosen
{shared}output_type: multiple_choice
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    tasks = module("lmms_eval.tasks").TaskManager(include_path=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = module("lmms_eval.evaluator").simple_evaluate(
            model="catp_jax",
            model_args=f"pretrained={shallow('mini-llama-vision')},prune=uniform,keep=50%",
            batch_size=2,
            tasks=["shapes_said", "shapes_chosen"],
            task_manager=tasks,
            bootstrap_iters=0,
        )
    said = [sample["resps"][0][0] for sample in out["samples"]["shapes_said"]]
    first = ours(lm, max_new_tokens=3)
    assert said == first.text[:3]
    tokenizer = lm.evaluated.model.reader.tokenizer
    (yes,), (no,) = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" yes", " no"))
    is_no = [row[no] > row[yes] for row in first.logits[:3]]
    assert out["results"]["shapes_chosen"]["acc,none"] == pytest.approx(sum(is_no) / 3)
