"""What lmms-eval calls: the class of the model ``megatron_omni``.

python -m lmms_eval --model megatron_omni --model_args base_url=http://127.0.0.1:8000/v1 --tasks TASKS
python -m lmms_eval --model megatron_omni --model_args checkpoint=runs/sft,python=.venv/bin/python --tasks TASKS
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from megatron_omni_lmms.asking import Asker, Question
from megatron_omni_lmms.body import THINKING, chat_messages, generation_fields, visual_part
from megatron_omni_lmms.local_server import LocalServer

Messages = Callable[[Any], list[dict[str, Any]]]
"""Of a document."""


class MegatronOmni(lmms):
    """A model behind a server of ours: that at ``base_url``, or one that is started for ``checkpoint``.

    Arguments (``--model_args``): ``base_url`` (ends with ``/v1``) with ``api_key`` (default: OPENAI_API_KEY) and ``model``
    (default: the server's), or ``checkpoint`` with ``python`` (the interpreter that has megatron_omni) and
    ``server_options`` (words for ``megatron-omni serve``); ``think_mode=True`` (the paper's system prompt A.3),
    ``system_prompt`` (a text or a file), ``max_new_tokens`` (instead of the tasks'), ``num_concurrent`` (64), ``timeout``.
    """

    is_simple = False

    def __init__(
        self,
        base_url: str | None = None,
        checkpoint: str | None = None,
        python: str | None = None,
        server_options: str = "",
        api_key: str | None = None,
        model: str | None = None,
        think_mode: bool = False,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        num_concurrent: int = 64,
        timeout: float = 3600.0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        del batch_size, max_batch_size, device  # of lmms-eval itself; the server batches
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "run lmms-eval as one process: the ranks of the server share its requests, each as it is free"
            )
        if (base_url is None) == (checkpoint is None):
            raise ValueError("model_args: give base_url=http://HOST:PORT/v1 or checkpoint=DIRECTORY, one of them")
        if checkpoint is not None:
            if not python:
                raise ValueError("model_args: checkpoint needs python=PATH, an interpreter that has megatron_omni")
            self.server = LocalServer(checkpoint, python=python, options=server_options)
            base_url = f"{self.server.url}/v1"
        elif python or server_options:
            raise ValueError("model_args: python and server_options belong to checkpoint, not to base_url")
        assert base_url is not None
        self._asker = Asker(
            base_url, api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none", model=model,
            concurrency=num_concurrent, timeout=timeout,
        )  # fmt: skip
        said = [THINKING] if think_mode else []
        said += [self._resolve_system_prompt(system_prompt)] if system_prompt else []
        self._system_prompt = "\n".join(said) or None
        self._max_new_tokens = max_new_tokens

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; those that only pad another rank's list are not asked."""
        asked = [request for request in requests if not request.metadata.get("__padding_only__")]
        answers = iter(self._asker.answers([self._question(request) for request in asked]))
        return ["" if request.metadata.get("__padding_only__") else next(answers) for request in requests]

    def _question(self, request: Instance) -> Question:
        settings, messages, doc_id, task, split = self._parts(request)
        # Read now: what the server has not is said before the first request of a run of hours.
        try:
            fields = generation_fields(settings, max_new_tokens=self._max_new_tokens)
        except ValueError as error:
            raise ValueError(f"task {task}: {error}") from None

        def body() -> dict[str, Any]:
            said = messages(self.task_dict[task][split][doc_id])
            return {"messages": chat_messages(said, system_prompt=self._system_prompt), **fields}

        return Question(f"{task}, document {doc_id}", body)

    def _parts(self, request: Instance) -> tuple[Mapping[str, Any], Messages, int, str, str]:
        """Settings, how to make messages of a document, and which document."""
        # Of five or six, depending on the release of lmms-eval; the first may be the context.
        *_, doc_to_messages, settings, doc_id, task, split = request.args
        return settings, doc_to_messages, doc_id, task, split

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """(Loss, whether it is the greedy one) of continuations of text, without turns and without media.

        Loss is minus the log-probability: lmms-eval takes the lowest as the model's choice (``Task.process_results``).
        """
        pairs = []
        for number, request in enumerate(requests):
            context, continuation, *rest = request.args
            where = f"{rest[-2]}, document {rest[-3]}" if len(rest) >= 3 else f"request {number}"
            if rest and rest[0] is not None and self._has_media(rest):
                raise ValueError(f"{where}: log-likelihoods are of text alone; use the task's generative form")
            pairs.append((where, context, continuation))
        found = self._asker.likelihoods(pairs)
        # lmms-eval 0.7.3 makes text of a bare pair.
        return [GenerationResult(text=(-logprob, greedy)) for logprob, greedy in found]  # type: ignore[arg-type]

    def _has_media(self, rest: Sequence[Any]) -> bool:
        doc_to_visual: Callable[[Any], Any]
        doc_to_visual, doc_id, task, split = rest
        return bool(doc_to_visual(self.task_dict[task][split][doc_id]))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: a round's question would depend on the answer before it."""
        raise NotImplementedError("tasks of several rounds (generate_until_multi_round) are not supported")


class MegatronOmniSimple(MegatronOmni):
    """The same for tasks that give a context and visuals instead of messages (``--force_simple``): visuals first."""

    is_simple = True

    def _parts(self, request: Instance) -> tuple[Mapping[str, Any], Messages, int, str, str]:
        context, settings, doc_to_visual, doc_id, task, split = request.args

        def messages(doc: Any) -> list[dict[str, Any]]:
            parts = [visual_part(value) for value in doc_to_visual(doc) or ()]
            return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]

        return settings, messages, doc_id, task, split
