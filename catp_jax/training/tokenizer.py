"""The mini models' tokenizers and processors, in Hugging Face format.

Each is a byte-level BPE, so that any text tokenizes.

- Llama 3.2's way of cutting words and its special tokens. As there, `<|image|>` is the first id
  beyond the vocabulary: the model has an input embedding for it and never says it. The processor
  writes `<|begin_of_text|>` into the prompt, after a leading `<|image|>`. The tokenizer therefore
  adds none of its own; every prompt holds exactly one.
- BLIP-2's, with OPT's special tokens and `</s>` before the text, or T5's and `</s>` after it. As in
  the large checkpoints `<image>`, which the processor repeats before all of that, is an id of the
  vocabulary; here it is the last.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
PAD, PYTHON, IMAGE = "<|finetune_right_pad_id|>", "<|python_tag|>", "<|image|>"
SPECIAL = (BOS, EOS, PAD, EOT, PYTHON)

END, BLIP2_IMAGE = "</s>", "<image>"
OPT_SPECIAL = ("<s>", "<pad>", END, "<unk>")  # numbered as in OPT
T5_SPECIAL = ("<pad>", END, "<unk>")  # numbered as in T5

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


def train_blip2_tokenizer(
    texts: Iterable[str], special: Sequence[str], vocab_size: int, max_length: int
) -> Any:
    """A `PreTrainedTokenizerFast` of exactly `vocab_size` tokens.

    OPT's or T5's `special` ones come first, then bytes and merges learned from `texts`, then
    reserved ones, and `<image>` last. Raises ValueError if the bytes and special tokens alone need
    more.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < (least := 256 + len(special) + 1):
        raise ValueError(f"a byte-level vocabulary needs {least} tokens or more, got {vocab_size}")
    is_opt = special == OPT_SPECIAL
    tokenizer = Tokenizer(models.BPE())
    # T5 makes no difference between a word at the start and within: both have a space before them.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not is_opt)
    bytes_to_text = decoders.ByteLevel()
    tokenizer.decoder = (
        bytes_to_text
        if is_opt
        else decoders.Sequence([bytes_to_text, decoders.Strip(" ", left=1, right=0)])
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=list(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            min_frequency=2,
            show_progress=False,
        ),
    )
    reserved = vocab_size - 1 - tokenizer.get_vocab_size()
    names = [*(f"<reserved_{number}>" for number in range(reserved)), BLIP2_IMAGE]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A" if is_opt else f"$A {END}", special_tokens=[end]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **({"bos_token": END} if is_opt else {}),
        eos_token=END,
        unk_token="<unk>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left" if is_opt else "right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def make_blip2_processor(tokenizer: Any, image_size: int, num_query_tokens: int) -> Any:
    """The `Blip2Processor` of a mini model: its tokenizer and the PIL image processor."""
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    image_processor = BlipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=num_query_tokens)


def load_processor(folder: Path) -> Any:
    """The processor that `write_processor` wrote."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def write_processor(processor: Any, folder: Path) -> None:
    """Writes every tokenizer and processor file of a Hugging Face folder."""
    processor.save_pretrained(folder)
    # Older releases look for the image processor here, and know the tokenizer by this name.
    processor.image_processor.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
