"""A folder's processor — tokenizer, image processor, chat template — checked before it is used.

transformers gets a copy of the files that belong to it, and nothing else of the folder: so no code
of the folder runs, and byte-order marks are gone. What transformers would make up where a file is
missing, such as a vocabulary, is refused.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from catp_jax import strict_json
from catp_jax.files import is_there
from catp_jax.terminal import without_advice

CONFIGS = (
    *("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
                "tokenizer.model")  # fmt: skip
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates/*.jinja"


def load_processor(folder: Path, tokenizers: tuple[str, ...] = ("tokenizer",)) -> Any:
    """A folder's processor, with these tokenizers; all but `tokenizer` have a folder of their own.

    Raises ValueError if a file is missing, damaged or of another kind, or if it names code that
    transformers itself does not have.
    """
    with without_advice():
        from transformers import AutoProcessor, ProcessorMixin  # here: it imports torch, if there

    _check_image_processor(folder)
    vocabularies = {}
    with tempfile.TemporaryDirectory(prefix="catp-jax-processor-") as copy:
        for name in tokenizers:
            inside = "" if name == "tokenizer" else name
            vocabularies[name] = vocabulary(folder / inside)
            _copy(folder / inside, Path(copy) / inside)
        with usable(folder, copy):
            processor = AutoProcessor.from_pretrained(
                copy, local_files_only=True, trust_remote_code=False
            )
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{folder} has a {type(processor).__name__} but no processor of images and text "
            "(processor_config.json, preprocessor_config.json); take the same checkpoint's"
        )
    for name in ("image_processor", *tokenizers):
        if getattr(processor, name, None) is None:
            raise ValueError(
                f"{folder}: the processor, a {type(processor).__name__}, has no {name}"
            )
    resample = getattr(processor.image_processor, "resample", None)
    if resample is not None and not isinstance(resample, int):
        raise ValueError(
            f"{folder}: resample must be the number of one of Pillow's filters, got {resample!r}; "
            "transformers takes another one in its place"
        )
    for name, wanted in vocabularies.items():
        if wanted - getattr(processor, name).get_vocab().keys():
            raise ValueError(
                f"{folder}: transformers makes a {name} of other tokens than its files have; their "
                "tokenizer_class must be the one that they were saved with"
            )
    return processor


@contextmanager
def usable(folder: Path, copy: str | None = None) -> Iterator[None]:
    """Whatever is raised inside becomes a ValueError that names the folder: other people's code
    raises nearly anything on files of the wrong kind.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = reason if copy is None else reason.replace(copy, str(folder))
        raise ValueError(f"{folder} has no processor that can be used ({reason[:400]})") from None


def check_processor(
    folder: Path,
    pairs: dict[str, tuple[Any, Any]],
    process: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, ...],
) -> None:
    """Raises ValueError unless in each pair what the processor has is what the model wants, and
    `process` makes numbers in this shape of any image.
    """
    wrong = [
        f"{name}: {has}, not {wanted}" for name, (has, wanted) in pairs.items() if has != wanted
    ]
    if wrong:
        raise ValueError(f"{folder}: the processor does not fit config.json ({'; '.join(wrong)})")
    with usable(folder), np.errstate(all="ignore"):
        pixels = process(np.full((4, 4, 3), 200, np.uint8))
    if pixels.shape != shape:
        raise ValueError(
            f"{folder}: the processor makes an image of {list(pixels.shape)}, the model takes "
            f"{list(shape)}; do_resize and do_pad must be true"
        )
    if not np.isfinite(pixels).all():
        raise ValueError(
            f"{folder}: the processor's image_mean and image_std make no finite numbers"
        )


def fingerprint(processor: Any) -> str:
    """What tells a processor from others that read a text or an image differently."""
    parts: list[Any] = [processor.chat_template, processor.image_processor.to_dict()]
    for name in ("tokenizer", "qformer_tokenizer"):
        tokenizer = getattr(processor, name, None)
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
            parts.append(tokenizer and tokenizer.get_vocab())  # a slow one
        else:
            whole = json.loads(backend.to_str())
            parts.append(whole | {"padding": None, "truncation": None})  # which calls set
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_image_processor(folder: Path) -> None:
    """Raises ValueError if there is none, where transformers would make one up."""
    whole = folder / "processor_config.json"
    has_own = is_there(folder / "preprocessor_config.json")
    if not has_own and not (is_there(whole) and "image_processor" in strict_json.read(whole)):
        raise ValueError(
            f"{folder}: the image processor is missing (preprocessor_config.json, or "
            "processor_config.json with an image_processor); take the same checkpoint's"
        )


def vocabulary(folder: Path) -> set[str]:
    """The tokens that a folder's tokenizer files have; empty where only transformers can tell.

    Raises ValueError if they are missing or need a package that is.
    """
    if is_there(path := folder / "tokenizer.json"):
        model = strict_json.read(path).get("model")
        found = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(found, list):  # Unigram: pairs of a token and its score
            found = [pair[0] for pair in found if isinstance(pair, list) and pair]
        return _tokens(path, found)
    if is_there(path := folder / "vocab.json"):
        if not is_there(folder / "merges.txt"):
            raise ValueError(f"{folder} has vocab.json but no merges.txt; copy it too")
        return _tokens(path, strict_json.read(path))
    if is_there(path := folder / "vocab.txt"):
        return _tokens(path, [line for line in read_text(path).splitlines() if line.strip()])
    for name in ("spiece.model", "tokenizer.model"):
        if is_there(path := folder / name):
            # lines of base64, as Llama 3 has them
            is_text = strict_json.read_bytes(path)[:200].isascii()
            package = "tiktoken" if is_text else "sentencepiece"
            if find_spec(package) is None:
                raise ValueError(
                    f"{folder} has its tokenizer only as {name}, and the package {package} reads "
                    f"it: pip install {package} protobuf; or take tokenizer.json from where the "
                    "checkpoint came from"
                )
            return set()
    raise ValueError(
        f"{folder}: the tokenizer is missing (tokenizer.json, or vocab.json and merges.txt, or "
        "spiece.model); take the same checkpoint's"
    )


def read_text(path: Path) -> str:
    """A file's text. Raises ValueError, which names the file."""
    try:
        return strict_json.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: byte {byte:#04x} at place {error.start}; save it as UTF-8"
        ) from None


def _tokens(path: Path, found: Any) -> set[str]:
    """What is found in a file as its tokens, if it is a vocabulary."""
    tokens = set(found) if isinstance(found, dict | list) and _all_text(found) else set()
    if not tokens:
        raise ValueError(f"{path} has no vocabulary; take the same checkpoint's")
    return tokens


def _all_text(found: dict[Any, Any] | list[Any]) -> bool:
    return all(isinstance(token, str) for token in found)


def _copy(folder: Path, out: Path) -> None:
    """The files of a processor, without code and byte-order marks."""
    out.mkdir(exist_ok=True)
    for name in CONFIGS:
        if is_there(path := folder / name):
            (out / name).write_text(json.dumps(_without_code(path, strict_json.read(path))))
    for path in [*(folder / name for name in (*VOCABULARIES, TEMPLATE)), *folder.glob(TEMPLATES)]:
        if is_there(path):
            copy = out / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(strict_json.read_bytes(path))


def _without_code(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config without `auto_map`, which names code of the folder, where the class is also one of
    transformers. Raises ValueError where it is not.
    """
    import transformers

    out = {
        key: _without_code(path, value) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    # also a class of any package, which it would make
    out.pop("audio_tokenizer", None)
    if out.pop("auto_map", None) is None:
        return out
    for key in ("processor_class", "tokenizer_class", "image_processor_type"):
        name = out.get(key)
        if name is not None and not hasattr(transformers, str(name)):
            raise ValueError(
                f"{path} wants code of its own for {key} {name!r}, which is never run; take a "
                "checkpoint in transformers' own format"
            )
    return out
