"""`acorn serve` in a thread of the test's process, and what it is asked and compared with."""

import http.client
import json
import threading
from pathlib import Path

import openai
import uvicorn

from finetune.data import PLAIN_TEMPLATE
from inference import generate
from inference.serving.app import ServedModel, Server, build_app
from inference.serving.listening import listen
from training.data.tokenizers import build_tokenizer
from training.model.loading import load_model_and_tokenizer

from . import tiny_bases

KEY, CONTEXT = "a-key-of-the-tests", 160
ASKED = [{"role": "user", "content": "What is the fruit of the oak?"}]


class Served:
    """A server on a free port of loopback, in a thread of this process."""

    def __init__(self, directory, is_batched: bool = False, api_key: str | None = None):
        self.directory = directory
        self.model, tokenizer = load_model_and_tokenizer(str(directory))
        self.listening = listen("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        served = ServedModel("tiny", self.model, tokenizer, is_batched)
        config = uvicorn.Config(build_app(served, api_key), log_level="critical", lifespan="on")
        self.server = Server(config, served)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listening]))
        self.thread.start()

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def post(self, path: str, body: bytes | dict, chunked: bool = False, **headers: str) -> tuple[int, dict]:
        """(status, body) of the answer to a request by hand."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | headers
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, iter([raw]) if chunked else raw, headers, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def chat_model(folder: Path) -> Path:
    """A random model of 160 positions whose tokenizer has a chat template."""
    tiny_bases.our_model("gpt", max_position_embeddings=CONTEXT, eos_token_id=None).save_pretrained(folder)
    tokenizer = build_tokenizer("byte")
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def written(capsys, directory, prompt: str, length: int) -> str:
    """What `acorn generate` writes greedily after a prompt."""
    capsys.readouterr()
    generate.main([str(directory), "--prompt", prompt, "--temperature", "0", "--max_new_tokens", str(length)])
    return capsys.readouterr().out.removesuffix("\n").removeprefix(prompt)


def streamed(stream) -> str:
    return "".join(piece.choices[0].text for piece in stream)
