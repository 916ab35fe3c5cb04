"""transformers' own server of the OpenAI protocol, serving one model that is loaded already, whatever its class."""

import asyncio
import inspect
import json
import uuid
from abc import ABC, abstractmethod

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState

from training.model.chat_template import render_messages
from training.model.sampling import Rendered, context_left, encode_prompt, stop_tokens
from training.system.errors import UserError

from .conversation import answer_ends
from .guard import Guard
from .protocol import Refusal, check_fields, fit_context, read_messages, read_prompt, read_wish, unfold
from .streams import OneByOne, Together, batch_settings

ROUTES = {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/load_model"}
SERVER_ERROR = "server_error"
GRACE = 5  # seconds in which answers may end when the server is stopped


class Server(uvicorn.Server):
    """uvicorn's server, which on being stopped waits for the answers under way, and ends those that take too long."""

    def __init__(self, config: uvicorn.Config, served: "ServedModel"):
        super().__init__(config)
        self.generator = served.generator

    async def shutdown(self, sockets=None) -> None:
        asyncio.get_running_loop().call_later(GRACE, self.end_answers)
        await super().shutdown(sockets)

    def handle_exit(self, sig, frame) -> None:
        if self.should_exit:  # whoever presses Ctrl-C again does not want to wait
            asyncio.get_running_loop().call_soon_threadsafe(self.end_answers)
        else:
            super().handle_exit(sig, frame)

    def end_answers(self) -> None:
        self.generator.end_answers(Refusal(503, "the server is stopping", "stopping", kind=SERVER_ERROR))


class ServedModel(ModelManager):
    """One loaded model under one name: no request loads another."""

    def __init__(self, name: str, model, tokenizer, is_batched: bool):
        self.force_model, self.model, self.tokenizer, self.is_batched = name, model, tokenizer, is_batched
        self.context_length, self.answer_ends = context_left(model), answer_ends(model, tokenizer)
        self.generator = Together(batch_settings(model)) if is_batched else OneByOne()
        if is_batched:
            self.generator.begin(model)

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "local"}]

    get_gen_models = list_models  # its name before transformers 5.24

    def load_model_and_processor(self, *args, **kwargs):
        return self.model, self.tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    async def load_model_streaming(self, model_id: str, gguf_file: str | None = None):
        """What `transformers chat` asks before it begins: events that end with a model being ready, or an error."""
        event = {"status": "ready", "cached": True}
        if model_id != self.force_model:
            event = {"status": "error", "message": str(other_model(model_id, self.force_model))}
        yield f"data: {json.dumps({'model': model_id, **event})}\n\n"

    def shutdown(self) -> None:
        self.generator.stop()


class State(GenerationState):
    """What `/health` asks of the batch."""

    def __init__(self, served: ServedModel):
        super().__init__(continuous_batching=served.is_batched)
        self._cb_manager = served.generator if served.is_batched else None


class Handler(ABC):
    """What transformers' handlers do with a request, for the one served model: checked, drawn, and answered by them."""

    kind: str

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        served = self.model_manager
        given = check_fields(unfold(body), self.kind)
        refuse_other_model(given.get("model", served.force_model), served.force_model)
        wish = read_wish(given, served.model, served.is_batched)
        wish.is_answer = self.kind == "chat"
        wish.ends = served.answer_ends if wish.is_answer else stop_tokens(served.model)
        ids = self.prompt_ids(given, served.tokenizer)
        fit_context(wish, len(ids), served.context_length)
        is_streamed = given.get("stream", False)
        answer = self._streaming if is_streamed else self._non_streaming
        more = {"tools": given.get("tools")} if "tools" in inspect.signature(answer).parameters else {}
        answered = answer(
            f"{self.kind}-{uuid.uuid4().hex}",
            served.model,
            served.tokenizer,
            served.force_model,
            {"input_ids": ids},
            wish,
            gen_manager=served.generator,
            **more,
        )
        return in_protocol(answered) if is_streamed else await answered

    @abstractmethod
    def prompt_ids(self, given: dict, tokenizer) -> list[int]:
        """The tokens that the answer to a request goes on from."""


class Completions(Handler, CompletionHandler):
    """`/v1/completions`: a text goes on."""

    kind = "completions"

    def prompt_ids(self, given: dict, tokenizer) -> list[int]:
        return encode_prompt(tokenizer, read_prompt(given))


class Chats(Handler, ChatCompletionHandler):
    """`/v1/chat/completions`: messages are answered."""

    kind = "chat"

    def prompt_ids(self, given: dict, tokenizer) -> list[int]:
        messages = read_messages(given)
        if not tokenizer.chat_template:
            message = f"{self.model_manager.force_model} has no chat template: it continues text; ask /v1/completions"
            raise Refusal(400, message, "no_chat_template", "messages")
        text = render_messages(tokenizer, "messages", messages, given.get("tools"), add_generation_prompt=True)
        if given.get("tools") and text == render_messages(tokenizer, "messages", messages, add_generation_prompt=True):
            raise Refusal(400, "tools: the chat template shows none; leave them out", "unsupported", "tools")
        return encode_prompt(tokenizer, Rendered(text))


def refuse_other_model(name: str, served: str) -> None:
    if name != served:
        raise other_model(name, served)


def other_model(name: str, served: str) -> Refusal:
    return Refusal(404, f"model {name!r} is not served here; ask for {served!r}", "model_not_found", "model")


def in_protocol(response: StreamingResponse) -> StreamingResponse:
    """The stream with the protocol's last line and its object for an error, which transformers gives as a text."""
    pieces, failure = response.body_iterator, 'data: {"error": "'

    async def body():
        async for piece in pieces:
            if failure in piece:
                whole, _, error = piece.partition(failure)
                message = error.removesuffix('"}\n\n')
                yield f"{whole}data: {json.dumps(Refusal(500, message, 'failed', kind=SERVER_ERROR).body())}\n\n"
                return
            yield piece
        yield "data: [DONE]\n\n"

    response.body_iterator = body()
    return response


def build_app(served: ServedModel, api_key: str | None = None, is_local: bool = True) -> Guard:
    """The server as an ASGI application. api_key: what every call must bring. is_local: calls are for this machine."""
    state = State(served)
    needed = inspect.signature(build_server).parameters
    handlers = {"chat_handler": Chats(served, state), "completion_handler": Completions(served, state)}
    handlers |= {name: None for name in needed if name.endswith("_handler") and name not in handlers}
    app = build_server(served, **handlers, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if route.path in ROUTES]

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> JSONResponse:
        refuse_other_model(name, served.force_model)
        return JSONResponse(served.list_models()[0])

    answer_in_protocol(app)
    return Guard(app, api_key, is_local)


# ---- errors


def answer_in_protocol(app: FastAPI) -> None:
    """Let every error be the protocol's object."""

    def refused(request: Request, error: Refusal) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    def failed(request: Request, error: Exception) -> JSONResponse:
        return refused(request, as_refusal(error))

    app.add_exception_handler(Refusal, refused)
    for kind in (UserError, HTTPException, RequestValidationError, CBWorkerDeadError, Exception):
        app.add_exception_handler(kind, failed)


def as_refusal(error: Exception) -> Refusal:
    """What goes to the client for an error of any class; of a bug nothing but that it was one."""
    if isinstance(error, UserError):
        return Refusal(400, str(error), "invalid_value")
    if isinstance(error, RequestValidationError):
        return Refusal(400, "the body must be a JSON object, sent as application/json", "invalid_json")
    if isinstance(error, HTTPException):
        message = f"there is nothing here; {', '.join(sorted(ROUTES))} are served" if error.status_code == 404 else None
        return Refusal(error.status_code, message or str(error.detail), None)
    if isinstance(error, CBWorkerDeadError):
        return Refusal(503, "the batch has died; start the server again", "batch_died", kind=SERVER_ERROR)
    return Refusal(500, "the server failed; its terminal says why", "internal_error", kind=SERVER_ERROR)
