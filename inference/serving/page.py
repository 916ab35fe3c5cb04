"""The playground's page: a prompt or a chat, tokens coloured by probability, attention; it travels with a Hub Space."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import torch

from .drawing import LEGEND, attention_html, chat_html, heads_html, message_html, passage_html, title_html
from .writing import Passage, Refused, Writer

HERE = Path(__file__).parent
SECONDS_BETWEEN = 0.08  # of what the browser is sent: a small model writes faster than a page is drawn
THE_MODEL = "the model"  # what requests take turns for
ALL_HEADS = "mean of all"
TEXT = '<div class="page-text" data-empty="{empty}">${{value}}</div>'
THEME = gr.themes.Default(  # with fonts that are there: none is fetched
    primary_hue="emerald",
    spacing_size="sm",
    text_size="md",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


@dataclass
class Look:
    """What the model attended to as it wrote the token at `place` of a passage: maps (layers, heads, tokens)."""

    number: int
    place: int
    pieces: list[str]
    maps: torch.Tensor


class Page:
    """What the page's controls do. What a visitor wrote is kept by gradio, and comes and goes as arguments.

    settings: max_new_tokens, temperature, top_k, top_p, repetition_penalty and seed, in this order.
    """

    def __init__(self, writer: Writer):
        self.writer = writer
        self.running: dict[str, threading.Event] = {}  # visitor: what stops the text that grows for him

    def write_prompt(self, request: gr.Request, prompt: str, *settings) -> Iterator[tuple]:
        """Yield (passages, HTML, message) as the text after the prompt grows."""
        try:
            passage = Passage(self.writer.encode(prompt))
            pieces = self.writer.pieces(passage.given)
            for message in self._grow(request, passage, *settings):
                yield [passage], passage_html(passage, pieces), message
        except Refused as error:
            yield gr.skip(), gr.skip(), message_html(str(error), is_refusal=True)

    def write_answer(self, request: gr.Request, question: str, system: str, chat: list, *settings) -> Iterator[tuple]:
        """Yield (question box, chat, HTML, message) as the answer grows; chat: (question, passage of the answer)s."""
        try:
            if not question.strip():
                raise Refused("The message is empty: type something.")
            given, fallen = self.writer.fitted(self._messages(question, system, chat), int(settings[0]))
            longer = [*chat, (question, Passage(given))]
            note = f"The context is full: the oldest {fallen} turns are no longer read. " if fallen else ""
            for message in self._grow(request, longer[-1][1], *settings, note=note):
                yield "", longer, self._chat_html(longer), message
        except Refused as error:
            yield question, gr.skip(), gr.skip(), message_html(str(error), is_refusal=True)

    def stop(self, request: gr.Request) -> None:
        """End the text that grows for this visitor, if one does."""
        if request.session_hash in self.running:
            self.running[request.session_hash].set()

    def look_at_prompt(self, passages: list[Passage], event: gr.EventData, layer: int, head: str) -> tuple:
        """(Look, HTML of all heads, HTML of one) of the token that was clicked on."""
        return self._look(passages, event, layer, head)

    def look_at_chat(self, chat: list, event: gr.EventData, layer: int, head: str) -> tuple:
        """The same in a conversation."""
        return self._look([passage for _, passage in chat], event, layer, head)

    def choose_head(self, event: gr.EventData) -> tuple[int, str]:
        """(layer, head) that was clicked on among all."""
        layer, head = event.at.split(":")
        return int(layer), head

    def draw_look(self, look: Look | None, layer: int, head: str) -> str:
        """HTML of one layer's attention: of one head, or of all on average."""
        if look is None:
            return ""
        heads = look.maps[min(int(layer), len(look.maps)) - 1]
        weights = heads.mean(0) if head == ALL_HEADS else heads[min(int(head), len(heads)) - 1]
        first = look.place - len(weights)
        return attention_html(look.pieces[first:-1], weights.tolist(), look.pieces[-1], look.number, first)

    def _grow(self, request: gr.Request, passage: Passage, *settings, note: str = "") -> Iterator[str]:
        """Let the passage grow, and yield what to say below it, a few times a second; note: what to say first."""
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed = settings
        if seed is None:
            raise Refused("The seed is empty: give a whole number.")
        sampling: dict = {"do_sample": temperature > 0, "repetition_penalty": float(repetition_penalty)}
        if temperature > 0:
            sampling |= {"temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p)}
        stop = self.running[request.session_hash] = threading.Event()
        started = shown = time.perf_counter()
        try:
            for _ in self.writer.write(passage, int(max_new_tokens), int(seed), stop, **sampling):
                if time.perf_counter() - shown > SECONDS_BETWEEN:
                    yield message_html(f"{note}{len(passage.tokens)} tokens …")
                    shown = time.perf_counter()
            why = "stopped" if stop.is_set() else self.writer.why_it_ended(passage, max_new_tokens)
        finally:
            stop.set()  # where nobody waits for the rest any more
            self.running.pop(request.session_hash, None)
        count, seconds = len(passage.tokens), time.perf_counter() - started
        yield message_html(f"{note}{count} tokens in {seconds:.1f} s, {count / seconds:.0f} a second: {why}.")

    def _messages(self, question: str, system: str, chat: list) -> list[dict]:
        """The conversation as chat templates take it, up to the new question."""
        turns = [("system", system)] * bool(system.strip())
        for asked, passage in chat:
            answer = self.writer.plain(passage).strip()  # a template sets its own spaces
            turns += [("user", asked), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in [*turns, ("user", question)]]

    def _chat_html(self, chat: list) -> str:
        return chat_html((asked, passage_html(passage, number=n)) for n, (asked, passage) in enumerate(chat))

    def _look(self, passages: list[Passage], event: gr.EventData, layer: int, head: str) -> tuple:
        number, place = map(int, event.at.split(":"))
        try:
            if number >= len(passages) or place >= len(passages[number].ids):
                raise Refused("This text is gone already: click into the new one.")
            pieces = self.writer.pieces(passages[number].ids[: place + 1])
            look = Look(number, place, pieces, self.writer.attention(passages[number], place))
        except Refused as error:
            return None, "", message_html(str(error), is_refusal=True)
        heads = heads_html([heads.tolist() for heads in look.maps], pieces[place - look.maps.shape[-1] : place])
        return look, heads, self.draw_look(look, layer, head)


# ---- what is on the page


def build_page(writer: Writer, name: str) -> gr.Blocks:
    """The page of a model called `name`."""
    page, has_chat = Page(writer), bool(writer.tokenizer.chat_template)
    with gr.Blocks(title=f"{name} · playground", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(title_html(name, writer.about()))
        with gr.Row():
            with gr.Column(scale=3, min_width=420), gr.Tabs():
                tabs = [tab(page) for tab in ((_chat_tab, _prompt_tab) if has_chat else (_prompt_tab,))]
            with gr.Column(scale=1, min_width=260):
                settings = _settings()
        attention = _attention_panel(page, writer.model.config.get_text_config(decoder=True))
        for connect in tabs:
            connect(settings, attention)
        blocks.unload(page.stop)
    return blocks


def open_page(blocks: gr.Blocks, **options) -> None:
    """Serve a page in the background, with its style; options: launch()'s."""
    look = {"theme": THEME, "css_paths": HERE / "page.css", "footer_links": ["api"], "run_history": False}
    blocks.launch(show_error=True, prevent_thread_lock=True, ssr_mode=False, **look, **options)


def _settings() -> list:
    """The controls of how text is drawn, in the order that Page takes them in."""
    with gr.Group():
        return [
            gr.Slider(1, 1024, 200, step=1, label="max new tokens"),
            gr.Slider(0, 2, 0.8, step=0.05, label="temperature", info="0: the likeliest"),
            gr.Slider(0, 500, 200, step=1, label="top-k", info="0: from all"),
            gr.Slider(0.01, 1, 1, step=0.01, label="top-p", info="1: from all"),
            gr.Slider(0.5, 2, 1, step=0.01, label="repetition penalty", info="above 1: less"),
            gr.Number(1337, precision=0, minimum=0, maximum=2**32 - 1, label="seed"),
        ]


def _script() -> str:
    return (HERE / "page.js").read_text(encoding="utf-8")


def _text(empty: str) -> gr.HTML:
    """Where tokens are shown: hovering over one and clicking on it do something."""
    return gr.HTML(
        "",
        html_template=TEXT.format(empty=empty),
        js_on_load=_script(),
        autoscroll=True,
    )


def _prompt_tab(page: Page) -> Callable:
    with gr.Tab("Prompt"):
        prompt = gr.Textbox(
            label="prompt", lines=3, max_lines=12, placeholder="Text to be continued; Shift+Enter writes on."
        )
        with gr.Row():
            write, stop = gr.Button("Write on", variant="primary"), gr.Button("Stop")
        text = _text("What the model writes after your prompt appears here.")
        message, passages = _below(), gr.State([])

    def connect(settings: list, attention: tuple[list, list]) -> None:
        gr.on(
            [prompt.submit, write.click],
            page.write_prompt,
            [prompt, *settings],
            [passages, text, message],
            concurrency_id=THE_MODEL,
            api_name="write",
        )
        stop.click(page.stop, queue=False, api_name=False)
        choice, drawn = attention
        text.select(page.look_at_prompt, [passages, *choice], drawn, concurrency_id=THE_MODEL, api_name=False)

    return connect


def _chat_tab(page: Page) -> Callable:
    with gr.Tab("Chat"):
        text = _text("The conversation appears here.")
        message, chat = _below(), gr.State([])
        question = gr.Textbox(label="your message", lines=2, max_lines=8, placeholder="Shift+Enter sends it.")
        with gr.Row():
            send, stop, again = gr.Button("Send", variant="primary"), gr.Button("Stop"), gr.Button("New conversation")
        system = gr.Textbox(label="system message", lines=1, max_lines=4, placeholder="What the model is told first.")

    def connect(settings: list, attention: tuple[list, list]) -> None:
        gr.on(
            [question.submit, send.click],
            page.write_answer,
            [question, system, chat, *settings],
            [question, chat, text, message],
            concurrency_id=THE_MODEL,
            api_name="answer",
        )
        stop.click(page.stop, queue=False, api_name=False)
        again.click(page.stop, queue=False, api_name=False).then(
            lambda: ([], "", message_html("")), None, [chat, text, message], concurrency_id=THE_MODEL, api_name=False
        )
        choice, drawn = attention
        text.select(page.look_at_chat, [chat, *choice], drawn, concurrency_id=THE_MODEL, api_name=False)

    return connect


def _below() -> gr.HTML:
    """The line below a text, with what the colours mean."""
    return gr.HTML(message_html(""), html_template=f"${{value}}{LEGEND}")


def _attention_panel(page: Page, config) -> tuple[list, list]:
    """([layer, head], [what was looked at, all heads, one head]): the controls, and what a click on a token fills."""
    layers, heads = (getattr(config, name, 1) for name in ("num_hidden_layers", "num_attention_heads"))
    look = gr.State(None)
    with gr.Accordion("What the model looked at", elem_classes="attention"), gr.Row():
        with gr.Column(scale=1, min_width=240):
            layer = gr.Slider(1, layers, layers, step=1, label="layer")
            head = gr.Dropdown([ALL_HEADS, *map(str, range(1, heads + 1))], value=ALL_HEADS, label="head")
            every = gr.HTML("", html_template='<div class="heads">${value}</div>', js_on_load=_script())
        with gr.Column(scale=3, min_width=420):
            one = _text("Click on a token above: the tokens before it are as dark as the model attended to them.")
    every.select(page.choose_head, None, [layer, head], api_name=False)
    for control in (layer, head):
        control.change(page.draw_look, [look, layer, head], one, api_name=False)
    return [layer, head], [look, every, one]
