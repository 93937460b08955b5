"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import Request

from inlay.runtime.drawing import TokenLogprobs

from .answers import AnswerText, ChatShape, CompletionShape, Shape
from .guard import key_of, user_of
from .keys import Key
from .names import Named
from .problems import Json, Problem
from .prompts import Prompt
from .reading import groups, prompt_logprobs
from .sending import Events, answered
from .service import Service, Work
from .wire import Chat, Completion, Writing

__all__ = ["WritingRoutes"]

SHORT = 16
"""Tokens of a completion where a request does not say, as at OpenAI."""


class WritingRoutes:
    """The endpoints that write text."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def completions(self, request: Request, body: Completion) -> Any:
        """Go on from each prompt, as it is."""
        service, key, given = self.service, key_of(request), body.prompts()
        body.check()
        named = service.names.read(body.model, key, user_of(request, body))
        service.check_count(len(given), _count(body))
        infos = service.names.infos(named)
        prompts = await service.encode(
            lambda: [service.prompts.raw(one, infos, body.add_special_tokens) for one in given]
        )
        asked = SHORT if body.max_tokens is None else body.max_tokens
        tokens = [service.prompts.answer_tokens(asked, prompt) for prompt in prompts]
        report = await self._report(named, body, prompts)
        echoed = self._echo(prompts) if body.echo else None
        shape = CompletionShape(
            named.title, service.words, body.asks_usage, prompts, echoed, report, body.logprobs is not None
        )
        await service.began(named, key, shape.head)
        if body.echo and asked == 0 and not body.stream:
            return self._echoed(named, body, prompts, shape)
        work = await self._submitted(named, key, body, prompts, tokens, body.logprobs)
        return await self._answer(request, body, work, shape)

    async def chat(self, request: Request, body: Chat) -> Any:
        """Answer a conversation, in the template that the adapter was trained with."""
        service, key = self.service, key_of(request)
        body.check()
        named = service.names.read(body.model, key, user_of(request, body))
        service.check_count(1, _count(body))
        infos, turns = service.names.infos(named), body.turns()
        prompt = await service.encode(lambda: service.prompts.chat(turns, infos))
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        tokens = service.prompts.answer_tokens(most, prompt)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        shape = ChatShape(named.title, service.words, body.asks_usage, bool(body.logprobs))
        await service.began(named, key, shape.head)
        work = await self._submitted(named, key, body, [prompt], [tokens], logprobs)
        return await self._answer(request, body, work, shape)

    async def _submitted(
        self, named: Named, key: Key, body: Writing, prompts: list[Prompt], tokens: list[int], logprobs: int | None
    ) -> Work:
        """The request's prompts at the engine. Raises: Problem."""
        settings = [body.sampling(most, logprobs) for most in tokens]
        grammar = await self.service.grammar(body)
        if grammar is not None:
            settings = [replace(one, grammar=grammar) for one in settings]
        return self.service.submit(named, key, prompts, settings)

    async def _answer(self, request: Request, body: Writing, work: Work, shape: Shape) -> Any:
        if body.stream:
            return Events(work, shape, body.asks_usage, self.service.limits.slow)
        return await answered(request, work, shape)

    # ---- echo

    def _echo(self, prompts: list[Prompt]) -> list[str]:
        """The words of each prompt."""
        decode = self.service.tokenizer.decode
        return [decode(one.ids, skip_special_tokens=False) if one.text is None else one.text for one in prompts]

    async def _report(
        self, named: Named, body: Completion, prompts: list[Prompt]
    ) -> list[list[TokenLogprobs | None]] | None:
        """What the model makes of the prompts' own tokens, where a request asks for that. Raises: Problem."""
        if not body.echo or body.logprobs is None:
            return None
        body.sampling(1, body.logprobs)  # what is wrong is refused before a forward
        best, found = body.logprobs, list[list[TokenLogprobs | None]]()
        for group in groups(prompts):

            def read(bank: Any, group: list[Prompt] = group) -> list[list[TokenLogprobs | None]]:
                return prompt_logprobs(bank, self.service.bank_route(named), group, best)

            found += await self.service.call(read)
        return found

    def _echoed(self, named: Named, body: Completion, prompts: list[Prompt], shape: CompletionShape) -> Json:
        """The prompts alone, with what was asked of them: no token is written."""
        n = _count(body)
        answers = [AnswerText(p, p * n + a, finish_reason="length") for p in range(len(prompts)) for a in range(n)]
        work = Work(self.service, named, prompts, [])
        work.end("done")
        return Json(shape.whole(answers, work.usage()), headers=shape.head.headers())


def _count(body: Writing) -> int:
    """Answers of each prompt. Raises: Problem."""
    if body.n is not None and body.n < 1:
        raise Problem(400, f"n is {body.n}. Choose a whole number of 1 or more.", param="n")
    return body.n or 1
