"""Continuous batching over a table of experts: the batches are transformers' own, and each token of one has its slot.

Blocks of the key-value cache are never shared between requests: what an expert wrote there is not another's.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cb_logits_processors as processors

from connito.curation.serving.errors import RefusedError
from connito.curation.serving.requests import Sampling
from connito.curation.serving.scoring import Scores, score
from connito.experts.table import BASE, ExpertTable
from connito.moe.head import Head

PAGE = 32


class _TopK(processors.ContinuousBatchingTopKLogitsWarper):  # type: ignore[misc]
    """The library's, without a sort where nobody restricts, and with one winner, not several equal ones, where k is 1."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] with what is left out at -inf."""
        top_k = tensor_arg[: scores.size(0)]
        greedy, free = top_k == 1, top_k >= scores.size(1)
        if not bool((greedy | free).all()):
            scores = super().__call__(scores, tensor_arg)
        best = torch.full_like(scores, float("-inf")).scatter(1, scores.argmax(1, keepdim=True), 0.0)
        return torch.where(greedy[:, None], best, scores)


class _TopP(processors.ContinuousBatchingTopPLogitsWarper):  # type: ignore[misc]
    """The library's, without a sort where nobody restricts. It is the last of them, and draws for who gave a seed."""

    seeds: dict[str, str]
    _draws: list[tuple[int, float]]

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Choose the place in [0, 1) of each seeded request's next token, by its seed and the tokens before it."""
        states = [request.state for request in requests_with_new_token]
        self._draws = [
            (row, Random(f"{seed}/{len(state.generated_tokens)}").random())
            for row, state in enumerate(states)
            if (seed := self.seeds.get(state.request_id))
        ]
        return super().prepare_tensor_args(requests_with_new_token)  # type: ignore[no-any-return]

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] with what is left out at -inf; of a seeded request, all but the token that is drawn."""
        free = bool((tensor_arg[: scores.size(0)].view(dtype=torch.float32) >= 1).all())
        scores = scores if free else super().__call__(scores, tensor_arg)
        for row, place in self._draws:
            chances = scores[row].double().softmax(0).cumsum(0)
            token = torch.searchsorted(chances, place * chances[-1], right=True)
            scores[row] = torch.full_like(scores[row], float("-inf")).index_fill(0, token, 0.0)
        return scores


class Generator:
    """Answers of a model, token by token, for as many requests at once as the cache holds."""

    def __init__(
        self, table: ExpertTable, *, ends: set[int], cache_tokens: int, batch_tokens: int, requests: int
    ) -> None:
        """Make the batches of `table`'s model. `ends`: tokens that end an answer; `cache_tokens`: of all requests together."""
        self.table, self.ends, self._batch_tokens = table, ends, batch_tokens
        self._slot_of: dict[str, int] = {}
        self._seeds: dict[str, str] = {}
        self._numbers = itertools.count()
        config = table.model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        blocks = max(2, -(-cache_tokens // PAGE))
        self.context = min(int(config.max_position_embeddings), (blocks - 1) * PAGE)
        # Values other than the neutral ones make transformers put each processor in; every request brings its own.
        drawn = GenerationConfig(
            do_sample=True, temperature=0.5, top_k=self.vocabulary - 1, top_p=0.5, eos_token_id=sorted(ends) or None
        )
        batching = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=blocks, max_batch_tokens=batch_tokens, max_requests_per_batch=requests,
            allow_block_sharing=False, use_async_batching=False, use_cuda_graph=False, per_request_processors=True,
        )  # fmt: skip
        self._manager = table.model.init_continuous_batching(
            generation_config=drawn, continuous_batching_config=batching
        )
        own = self._manager.logit_processor.logits_processor
        for found in own:
            for kind in (_TopK, _TopP):
                if type(found) is kind.__base__:
                    found.__class__ = kind
                    found.seeds = self._seeds
        table.model.requires_grad_(False)
        self._head = Head(table.model)
        self._hook = table.model.register_forward_pre_hook(self._place, with_kwargs=True)

    def start(self) -> None:
        """Begin to compute, in a thread of its own."""
        self._manager.start()

    def stop(self) -> None:
        """Fail what is not finished, and leave the model as it was."""
        self._manager.stop(hard_stop=True, timeout=30)
        self._hook.remove()
        self.table.token_slots = None

    def alive(self) -> bool:
        """Return whether requests are computed."""
        return bool(self._manager.is_running()) and self._manager.background_thread_status.fatal_error is None

    def _require_alive(self) -> None:
        if not self.alive():
            raise RefusedError(503, "the model is not running; see the server's log")

    def busy(self) -> int:
        """Return how many requests wait or are computed."""
        return len(self._slot_of)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the computation between two batches: the table may be changed. Blocks until the present batch is done."""
        if not self.alive():
            yield
            return
        with self._manager.pause():
            yield

    async def answer(self, ids: list[int], slot: int, how: Sampling) -> AsyncGenerator[list[int]]:
        """Give new tokens as they come; leaving early cancels the request. Raises `RefusedError` where it cannot be computed."""
        self._require_alive()
        name, steps, loop = f"r{next(self._numbers)}", asyncio.Queue[Any](), asyncio.get_running_loop()
        router = self._manager.output_router
        self._slot_of[name] = slot
        self._seeds[name] = how.seed
        done = 0
        try:
            self._manager.register_result_handler(name, steps.put_nowait)
            await loop.run_in_executor(None, self._add, name, ids, how)
            while True:
                step = await steps.get()
                if step.error is not None:
                    raise RefusedError(503, "the request could not be computed; try again")
                new, done = step.generated_tokens[done:], len(step.generated_tokens)
                if new:
                    yield new
                if step.is_finished():
                    return
        finally:
            self._manager.cancel_request(name)
            with router._lock:
                router.result_handlers.pop(name, None)
            self._slot_of.pop(name, None)
            self._seeds.pop(name, None)
            # What comes for a request that nobody waits for is kept by the library.
            while not router.output_queue.empty():
                router.output_queue.get_nowait()

    def score(self, ids: list[int], slot: int, count: int, ahead: bool) -> Scores:
        """Return the scores of a prompt, between two batches: nothing else is computed meanwhile, so one call at a time."""
        self._require_alive()
        with self.paused():
            # One for all tokens, as many as a pass has.
            self.table.token_slots = torch.full((1,), slot, device=self.table.device)
            try:
                return score(self._head, ids, count, ahead=ahead, most=self._batch_tokens)
            finally:
                self.table.token_slots = None

    def _add(self, name: str, ids: list[int], how: Sampling) -> None:
        greedy = how.temperature < 1e-3
        self._manager.add_request(
            ids, request_id=name, max_new_tokens=how.max_tokens, streaming=True, eos_token_id=sorted(self.ends),
            temperature=1.0 if greedy else float(how.temperature), top_p=1.0 if greedy else float(how.top_p),
            top_k=1 if greedy else min(how.top_k or self.vocabulary, self.vocabulary),
        )  # fmt: skip

    def _place(self, _: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Tell the table whose tokens the batch holds, in their order."""
        if "cu_seq_lens_q" not in keywords:  # A prompt that is scored, whose slots are there.
            return
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        slots = torch.tensor(
            [self._slot_of.get(entry.state.request_id, BASE) for entry in batch], device=self.table.device
        )
        lengths = keywords["cu_seq_lens_q"][: len(batch) + 1].diff().long()
        self.table.token_slots = slots.repeat_interleave(lengths)
