"""The mini models' tokenizer and processor, in Hugging Face format.

A byte-level BPE, so that any text tokenizes, with Llama 3.2's way of cutting words and its special
tokens. As there, `<|image|>` is the first id beyond the vocabulary: the model has an input
embedding for it and never says it.

The processor writes `<|begin_of_text|>` into the prompt, after a leading `<|image|>`. The tokenizer
therefore adds none of its own; every prompt holds exactly one.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
PAD, PYTHON, IMAGE = "<|finetune_right_pad_id|>", "<|python_tag|>", "<|image|>"
SPECIAL = (BOS, EOS, PAD, EOT, PYTHON)

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text before BPE: a word takes the one space before it along."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A `PreTrainedTokenizerFast` of exactly `vocab_size` tokens and `<|image|>`.

    Bytes and merges learned from `texts` come first, then the special tokens, then reserved ones
    up to `vocab_size`. Raises ValueError if the bytes and special tokens alone need more.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < (least := 256 + len(SPECIAL)):
        raise ValueError(f"a byte-level vocabulary needs {least} tokens or more, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            min_frequency=2,
            show_progress=False,
        ),
    )
    reserved = vocab_size - len(SPECIAL) - tokenizer.get_vocab_size()
    names = [*SPECIAL, *(f"<|reserved_special_token_{i}|>" for i in range(reserved)), IMAGE]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: Any, tile_size: int, max_num_tiles: int) -> Any:
    """The `MllamaProcessor` of a mini model: its tokenizer and the PIL image processor."""
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    image_processor = MllamaImageProcessorPil(
        size={"height": tile_size, "width": tile_size}, max_image_tiles=max_num_tiles
    )
    return MllamaProcessor(image_processor=image_processor, tokenizer=tokenizer)


def load_processor(folder: Path) -> Any:
    """The processor that `write_processor` wrote."""
    from transformers import MllamaProcessor

    return MllamaProcessor.from_pretrained(folder)


def write_processor(processor: Any, folder: Path) -> None:
    """Writes every tokenizer and processor file of a Hugging Face folder."""
    processor.save_pretrained(folder)
    # Older releases look for the image processor here, and know the tokenizer by this name.
    processor.image_processor.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
