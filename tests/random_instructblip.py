"""A folder with a tiny random InstructBLIP and a processor of words for it."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import InstructBlipProcessor, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from tests.parity.tiny_blip2 import QUERIES
from tests.parity.tiny_instructblip import tiny_hf

WORDS = ["<pad>", "<unk>", "</s>", "what", "color", "is", "the", "circle", "square", "?"]


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of words, numbered as they come."""
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )


def save_processor(folder: Path, qformer_words: list[str], queries: int = QUERIES) -> None:
    # "abcdef" is what transformers puts in front of each token, to see what it writes
    words = [*WORDS, *(f"word{number}" for number in range(len(WORDS), 48)), "abcdef", "<image>"]
    tokenizer = word_tokenizer(words)
    tokenizer.padding_side = "left"
    images = BlipImageProcessorPil(size={"height": 12, "width": 12})
    InstructBlipProcessor(
        images, tokenizer, word_tokenizer(qformer_words), num_query_tokens=queries
    ).save_pretrained(folder)


def save_random(name: str, folder: Path) -> Path:
    """The model "vicuna" or "t5"; its Q-Former numbers the words the other way round."""
    tiny_hf(name).save_pretrained(folder)
    save_processor(folder, [*WORDS[:2], *reversed(WORDS[2:])])
    return folder
