"""The model `catp_jax` of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which finds it
by an entry point of this package:

    lmms-eval --model catp_jax --model_args pretrained=DIR,prune=fastv,keep=50% --tasks pope

Settings are those of `answering.Evaluated`. Prompts go through the checkpoint's chat template if it
has one; `chat=false` asks them as they are. A request that the model cannot answer, such as one
with several images to BLIP-2, has the reason in place of its answer.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult  # pyright: ignore
from lmms_eval.api.model import lmms  # pyright: ignore
from tqdm import tqdm

from catp_jax.answers import Likelihood
from catp_jax.evaluation.answering import Asked, Evaluated


class CatpJax(lmms):
    """Answers the requests of lmms-eval's tasks, in batches of one shape."""

    is_simple = True  # requests are a text and what brings its images

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        chat: bool | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        """`device` and `max_batch_size`, which lmms-eval always gives, say nothing here: JAX finds
        its devices, and all batches are of one size.
        """
        super().__init__()
        self.evaluated = Evaluated(str(pretrained), batch_size=batch_size, is_chat=chat, **settings)
        # the choices of a document, one after another, share its images, which are encoded once
        self._images = functools.lru_cache(maxsize=1)(self._images_of)

    @property
    def batch_size(self) -> int:
        """Of every batch."""
        return self.evaluated.batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        asked = [
            Asked(context, lambda source=(bring, *place): self._images(*source), options)
            for context, options, bring, *place in (request.args for request in requests)
        ]
        with tqdm(total=len(asked), desc="answering", disable=self.rank != 0) as bar:
            texts = self.evaluated.answers(asked, bar.update)
        for one, text in zip(asked, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (one.prompt, dict(one.options)), text)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """A number for how likely each answer is, and whether it is the greedy one, as the `text`
        of a result: of a bare pair 0.7.3 makes a string (`unwrap_generation_output`), which none of
        its metrics can read. Its response cache can hold neither.

        lmms-eval reads that number in two ways (`ConfigurableTask.process_results`):

        - of a `multiple_choice` it takes the choice with the least, since its own models return the
          loss. Such an answer is a text, and gets the mean negative log-probability of its tokens;
          inf if it has none.
        - of a `loglikelihood` it makes a perplexity, exp of the negative mean. Such an answer is a
          function of the document, and gets its log-probability; -inf if it has none. No task of
          0.7.3 is of this kind, and its own metrics fail there, whatever the model.

        Its metric `acc_mutual_info` wants the choice with the most, which is wrong for losses.
        """
        asked, is_choice = [], []
        for context, answer, *source in (request.args for request in requests):
            is_choice.append(isinstance(answer, str))
            text = answer if isinstance(answer, str) else answer(self._doc(*source[1:]))
            asked.append((Asked(context, lambda source=source: self._images(*source)), text))
        with tqdm(total=len(asked), desc="scoring", disable=self.rank != 0) as bar:
            found = self.evaluated.likelihoods(asked, bar.update)
        pairs = zip(found, is_choice, strict=True)
        return [GenerationResult(text=_as_read(*each)) for each in pairs]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises NotImplementedError: no task of several rounds."""
        raise NotImplementedError("catp_jax answers tasks of one round; leave this task out")

    def _doc(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _images_of(self, bring: Any = None, *place: Any) -> list[Any]:
        """The images of a request's document; a request may come without."""
        return [] if bring is None else list(bring(self._doc(*place)) or ())


def _as_read(found: Likelihood | None, is_choice: bool) -> tuple[float, bool]:
    """A likelihood as lmms-eval reads it; see `CatpJax.loglikelihood`."""
    if found is None:
        return (math.inf if is_choice else -math.inf), False
    return (-found.total / len(found.tokens) if is_choice else found.total), found.is_greedy
