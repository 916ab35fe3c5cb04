"""How requests get their text: one after the other by the one sampler, or together by continuous batching."""

import asyncio
import secrets
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from weakref import WeakKeyDictionary

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cli.serving.utils import (
    CBGenerateManager,
    DirectStreamer,
    GenerateManager,
    _GenerationCancelled,
    _StreamError,
)

from training.model.sampling import TextPrinter, context_left, stop_tokens
from training.model.sizes import text_config
from training.system.errors import UserError, one_line

from ..decoding.batches import Job, grow, has_virtual_tokens
from .protocol import Refusal, Wish

FIRST_SECONDS = 300  # for the batch's first token: a GPU may compile
STOP_SECONDS = 10


class Ended(Exception):
    """Raised out of generate() where a request's text has ended or nobody waits for it any more."""


class TextStream(TextPrinter):
    """The text of one request, delivered piece by piece and None at its end; it ends before a text to stop at.

    An answer in a chat begins without the space that the template sets before it. deliver: called with each piece.
    cancel() makes whoever feeds it stop at the next token.
    """

    def __init__(self, tokenizer, prompt_ids: list[int], wish: Wish, deliver: Callable[[str | None], object]):
        super().__init__(tokenizer, prompt_ids, self._take, wish.stops)
        self.prompt_length, self.deliver, self.is_at_space = len(prompt_ids), deliver, wish.is_answer
        self.is_finished, self.cancelled = False, threading.Event()

    @property
    def generated_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]

    @property
    def total_tokens(self) -> int:
        return len(self.ids) - self.prompt_length

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled.is_set():
            raise Ended
        super().put(value)
        if self._has_stopped:
            raise Ended

    def finish(self) -> None:
        super().finish()
        self.is_finished = True
        self.deliver(None)

    def cancel(self) -> None:
        self.cancelled.set()

    def _take(self, piece: str) -> None:
        piece = piece.lstrip() if self.is_at_space else piece
        if piece:
            self.is_at_space = False
            self.deliver(piece)


class Penalties(LogitsProcessor):
    """The protocol's penalties of tokens that were written: one for each time (frequency), one once (presence)."""

    def __init__(self, frequency: float, presence: float, prompt_length: int):
        self.frequency, self.presence, self.prompt_length = frequency, presence, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def draw(model, tokenizer, ids: list[int], wish: Wish, streamer) -> None:
    """Let `acorn generate`'s sampler write a request's text into `streamer`."""
    generation = dict(wish.generation)
    if any(wish.penalties):
        generation["logits_processor"] = LogitsProcessorList([Penalties(*wish.penalties, len(ids))])
    seed = secrets.randbits(63) if wish.seed is None else wish.seed
    job = Job(model, tokenizer, wish.max_new_tokens, wish.ends, wish.stops, seed=seed, generation=generation)
    try:
        grow(job, [ids], streamer)
    except ValueError as error:  # of transformers, where settings that are right alone leave nothing to draw
        raise UserError(f"these settings do not go together: {one_line(error)}") from error


class Failure(_StreamError):
    """The end of a stream whose text could not be drawn: of what the client can mend, or of a bug."""

    def __init__(self, error: Exception):
        if not isinstance(error, UserError | Refusal):
            traceback.print_exception(error)  # for whoever runs the server
        super().__init__(one_line(error).replace("\\", "/").replace('"', "'"))  # transformers puts it between quotes
        self.error = error


async def collect(queue: asyncio.Queue, stream) -> str:
    """The whole text of a stream, which is cancelled if nobody waits for it any more."""
    pieces: list[str] = []
    try:
        while (piece := await queue.get()) is not None:
            if isinstance(piece, Failure):
                raise piece.error
            pieces.append(piece)
    except asyncio.CancelledError:
        stream.cancel()
        raise
    return "".join(pieces)


class Answers:
    """The answers under way, of either kind below."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.open: WeakKeyDictionary = WeakKeyDictionary()  # a stream: its queue

    def end_answers(self, error: Exception) -> None:
        """End what is under way with this error."""
        for stream, queue in list(self.open.items()):
            stream.cancel()
            queue.put_nowait(Failure(error))

    async def generate_non_streaming(self, model, processor, inputs, gen_config: Wish, request_id):
        """(text, tokens of the prompt, ids of the answer), as transformers' handlers take it."""
        queue, stream = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        text = await collect(queue, stream)
        return text, len(inputs["input_ids"]), stream.generated_ids


class OneByOne(Answers, GenerateManager):
    """Requests one after the other, in the order of their coming, on one thread."""

    def generate_streaming(self, model, processor, inputs, gen_config: Wish, request_id, response_parser=None):
        ids, loop, queue = inputs["input_ids"], asyncio.get_running_loop(), asyncio.Queue()
        if response_parser is None:
            stream = TextStream(
                processor, ids, gen_config, lambda piece: loop.call_soon_threadsafe(queue.put_nowait, piece)
            )
        else:  # a model whose answers have parts, such as calls of tools
            stream = DirectStreamer(processor._tokenizer, loop, queue, response_parser=response_parser)
        self.open[stream] = queue
        self.submit(self._run, model, processor, ids, gen_config, stream, loop, queue)
        return queue, stream

    def _run(self, model, tokenizer, ids, wish, stream, loop, queue) -> None:
        try:
            with suppress(Ended, _GenerationCancelled):  # what was drawn until then is the text
                draw(model, tokenizer, ids, wish, stream)
        except Exception as error:
            loop.call_soon_threadsafe(queue.put_nowait, Failure(error))
            return
        if isinstance(stream, TextStream):
            stream.finish()

    def stop(self) -> None:
        """Wait for the thread to be done with what has ended."""
        with suppress(TimeoutError):
            self.submit(lambda: None).result(timeout=STOP_SECONDS)


def batch_settings(model) -> ContinuousBatchingConfig:
    """How continuous batching keeps its keys and values: on a GPU in most of its memory, as transformers decides.

    On a CPU in pages for 32 whole contexts, or a gigabyte of them: to fill most of the memory takes half a minute.
    """
    if model.device.type != "cpu":
        return ContinuousBatchingConfig(per_request_processors=True)
    config, page = text_config(model.config), 16
    page_bytes = page * config.num_hidden_layers * 2 * config.hidden_size * model.dtype.itemsize
    pages_each = -(-context_left(model) // page) + 1
    pages = max(pages_each, min(32 * pages_each, 2**30 // page_bytes))
    name = "page_size" if "page_size" in signature(ContinuousBatchingConfig).parameters else "block_size"  # before 5.18
    sizes = {name: page, "num_blocks": pages, "max_batch_tokens": 256}
    return ContinuousBatchingConfig(per_request_processors=True, **sizes)


def batch_sampling(sampling: dict, vocabulary: int) -> dict:
    """A request's sampling as the batch takes it; more than all tokens as `top_k` ends it before transformers 5.18."""
    if not sampling["do_sample"]:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    return {
        "temperature": float(sampling["temperature"]),
        "top_k": min(sampling["top_k"] or vocabulary, vocabulary),
        "top_p": float(sampling["top_p"]),
    }


class Together(Answers, CBGenerateManager):
    """Requests together, token by token, by transformers' continuous batching."""

    def begin(self, model) -> None:
        """Start the batch, and let it write a token; each request brings its own temperature, top_k and top_p.

        Raises UserError for a model that cannot be batched.
        """
        refusal = "--continuous_batching: this model cannot be batched ({}); serve it without"
        if has_virtual_tokens(model):
            raise UserError(refusal.format("its adapter puts virtual tokens before the text"))
        settings = {"temperature": 0.5, "top_k": 1, "top_p": 0.5, "eos_token_id": stop_tokens(model) or -1}
        try:
            self.init_cb(model, GenerationConfig(do_sample=True, **settings))
            self._cb.add_request([0], request_id="first", max_new_tokens=1)
            first = self._cb.get_result(timeout=FIRST_SECONDS)
        except Exception as error:  # whatever a foreign class raises where it has not what the batch needs
            raise UserError(refusal.format(one_line(error))) from error
        if first is None or first.error is not None:
            self.stop()
            raise UserError(refusal.format(first.error if first else f"no token in {FIRST_SECONDS} seconds"))

    def generate_streaming(self, model, processor, inputs, gen_config: Wish, request_id, response_parser=None):
        self._check_alive(request_id)
        ids, queue = inputs["input_ids"], asyncio.Queue()
        stream = TextStream(processor, ids, gen_config, queue.put_nowait)
        stream.is_prompt_next = False
        self.open[stream] = queue

        def take(output) -> None:
            if stream.is_finished:
                return
            try:
                stream.put(torch.tensor(output.generated_tokens[stream.total_tokens :]))
            except Ended:
                self._cb.cancel_request(request_id)
                stream.finish()
                return
            if output.error is not None:
                queue.put_nowait(Failure(RuntimeError(output.error)))
            elif output.is_finished():
                stream.finish()

        self._cb.register_result_handler(request_id, take)
        self._cb.add_request(
            ids,
            request_id=request_id,
            streaming=True,
            max_new_tokens=gen_config.max_new_tokens,
            eos_token_id=gen_config.ends or -1,
            **batch_sampling(gen_config.generation, text_config(model.config).vocab_size),
        )
        return queue, stream

    def stop(self) -> None:
        if self._cb is not None:
            self._cb.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)
