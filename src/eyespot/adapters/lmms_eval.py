"""An eyespot model under lmms-eval 0.7.3: ``lmms-eval --model eyespot --model_args pretrained=FOLDER --tasks ...``

Where that version does something else than it documents, the scores decide, and the place says so.
Source: https://github.com/EvolvingLMMs-Lab/lmms-eval (lmms_eval/api/model.py, instance.py and task.py)
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from eyespot.adapters.requests import READ, conversation, cut, options
from eyespot.data.sample import text_part
from eyespot.inference import MAX_NEW_TOKENS, Conversation, load

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(f'lmms-eval cannot be imported ({error}); pip install "eyespot[harness]"') from error


class Likelihood(tuple[float, bool], GenerationResult):  # type: ignore[misc]
    """(value, whether greedy decoding says the same): the pair that ``lmms.loglikelihood`` is to return.

    The evaluator of 0.7.3 makes a text of a plain pair, on which every task of likelihoods fails; of a
    ``GenerationResult`` it takes the content, which is the pair again.
    """


class Eyespot(lmms):  # type: ignore[misc]
    """A trained model under the name "eyespot".

    Args:
        pretrained: folder of the model. dtype, adapter: see ``eyespot.load``.
        batch_size: requests in one pass.
        device: "auto", "cpu", "cuda", ...; of several processes each takes its own.
        max_new_tokens: limit of an answer where the task sets none.

    Raises:
        ValueError: batch_size is not a number above 0, or nothing usable at ``pretrained``.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        adapter: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; give a number of 1 or more")
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()  # the evaluator gathers through it
            device = str(self.accelerator.device)
        self.assistant = load(pretrained, device or "auto", dtype, adapter)
        self.device = self.assistant.device
        self._unread: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each (context, gen_kwargs, doc_to_visual, doc_id, task, split)."""
        return self._in_batches(requests, self._answers)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """All answers to each request; its task makes the next question of those before."""
        return self._in_batches(requests, lambda asked: [self._rounds(*args) for args in asked])

    def loglikelihood(self, requests: Sequence[Any]) -> list[Likelihood]:
        """How likely the model finds given answers, their end included, and whether it would say them.

        A task of type loglikelihood hands over a function that tells the answer; the value is the log-probability, of
        which 0.7.3 makes a perplexity. The choices of a multiple_choice task are texts; the value is minus the
        log-probability, because 0.7.3 takes the choice with the least
        (https://github.com/EvolvingLMMs-Lab/lmms-eval/issues/370).
        """
        return self._in_batches(requests, self._likelihoods)

    def clean(self) -> None:
        """Called after the last request, so that a judge finds the memory free."""
        del self.assistant
        super().clean()

    def _in_batches(self, requests: Sequence[Any], work: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        """Results in the order of the requests. Those of equal settings go together, in their order, because neighbours
        share pictures."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            settings = request.args[1] if isinstance(request.args[1], Mapping) else None
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(place)
        results: dict[int, Any] = {}
        with self.assistant.folded(), tqdm(total=len(requests), desc="eyespot", disable=self.rank != 0) as bar:
            for places in groups.values():
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    results.update(zip(batch, work([requests[place].args for place in batch]), strict=True))
                    bar.update(len(batch))
        return [results[place] for place in range(len(requests))]

    def _doc(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _answers(self, asked: Sequence[Any]) -> list[str]:
        conversations = [conversation(see(self._doc(*where)), context) for context, _, see, *where in asked]
        return self._say(conversations, asked[0][1])

    def _rounds(self, context: str, settings: Mapping[str, Any], see: Any, ask: Any, *where: Any) -> list[str]:
        doc = self._doc(*where)
        pictures, state, is_over = see(doc), None, False
        answers: list[str] = []
        while not is_over:
            answers = [*answers, *self._say([conversation(pictures, context)], settings)]
            pictures, context, is_over, answers, state = ask(
                doc, previous_output=answers, round_idx=len(answers), previous_round_info=state
            )
        return list(answers)

    def _likelihoods(self, asked: Sequence[Any]) -> list[Likelihood]:
        conversations = []
        for context, target, see, *where in asked:
            doc = self._doc(*where)
            images, messages = conversation(see(doc), context)
            answer = target if isinstance(target, str) else target(doc)
            # the template writes the space before an answer, so the one that lmms-eval puts there is left out
            said = {"role": "assistant", "content": [text_part(answer.strip())]}
            conversations.append((images, [*messages, said]))
        signs = [-1 if isinstance(args[1], str) else 1 for args in asked]
        scores = self.assistant.score_answers(conversations)
        return [Likelihood((sign * score, is_greedy)) for sign, (score, is_greedy) in zip(signs, scores, strict=True)]

    def _say(self, conversations: Sequence[Conversation], settings: Mapping[str, Any]) -> list[str]:
        if unread := sorted(settings.keys() - READ - self._unread):
            self._unread.update(unread)
            logging.getLogger(__name__).warning("eyespot does not read %s in generation_kwargs", ", ".join(unread))
        limit = int(settings.get("max_new_tokens") or self.max_new_tokens)
        if told := options(settings):
            texts = self.assistant.generate_text(conversations, max_new_tokens=limit, **told)
        else:
            texts = self.assistant.answer_batch(conversations, limit)
        return [cut(text, settings.get("until")) for text in texts]
