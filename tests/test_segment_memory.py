"""Transformer-XL's memory: bounded, detached, each row's own, and read by generate() past the context."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from modeling.segment_memory import SegmentMemory

from .test_modeling import CLOSE
from .variants import random_model, tiny_config

SEGMENT, LENGTH = 8, 44  # the text does not end where a segment does


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(1, 61, (3, LENGTH), generator=torch.Generator().manual_seed(7))  # 0 is the padding


def build(memory_length: int = SEGMENT, **overrides):
    """A model of two layers that reads in segments of 8 tokens."""
    shape = {"position_encoding": "rope", "max_position_embeddings": SEGMENT, "memory_length": memory_length}
    return random_model(tiny_config(**{**shape, **overrides}))


def read(model, ids: torch.Tensor, pieces, memory: SegmentMemory | None = None) -> torch.Tensor:
    """The logits of a text that is read piece by piece with a memory."""
    memory = memory or SegmentMemory(model.config)
    return torch.cat([model(piece, past_key_values=memory).logits for piece in ids.split(pieces, dim=1)], dim=1)


def read_in_lanes(model, ids: torch.Tensor, begins: torch.Tensor, memory: SegmentMemory) -> torch.Tensor:
    """The same as training and evaluation read it; begins: (batch, segments), 1 where a row is another text."""
    logits = []
    for piece, is_new in zip(ids.split(SEGMENT, dim=1), begins.unbind(1), strict=True):
        mask = memory.begin_segment(is_new, piece.shape[1])
        logits.append(model(piece, attention_mask=mask, past_key_values=memory, use_cache=False).logits)
    return torch.cat(logits, dim=1)


def none_begin(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), -(-ids.shape[1] // SEGMENT), dtype=torch.long)


@pytest.mark.parametrize("overrides", [{}, {"position_encoding": "none"}, {"num_key_value_heads": 2}])
@torch.no_grad()
def test_a_memory_of_everything_is_full_attention(overrides: dict, text: torch.Tensor) -> None:
    model = build(LENGTH, **overrides)
    whole = model(text, use_cache=False).logits
    torch.testing.assert_close(read(model, text, SEGMENT), whole, rtol=1e-5, atol=1e-5)
    in_lanes = read_in_lanes(model, text, none_begin(text), SegmentMemory(model.config))
    torch.testing.assert_close(in_lanes, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_memory_is_the_plain_model(text: torch.Tensor) -> None:
    model = build(0)
    plain = torch.cat([model(piece, use_cache=False).logits for piece in text.split(SEGMENT, dim=1)], dim=1)
    torch.testing.assert_close(read(model, text, SEGMENT, SegmentMemory(model.config)), plain, **CLOSE)
    assert isinstance(model(text[:, :4], use_cache=True).past_key_values, DynamicCache)


@pytest.mark.parametrize("memory_length", [3, 8, 12])
@torch.no_grad()
def test_token_by_token_is_segment_by_segment(memory_length: int, text: torch.Tensor) -> None:
    model = build(memory_length)
    segments = read(model, text, SEGMENT)
    for pieces in (1, [5, 3, 1, 7, 8, 8, 4, 4, 4]):
        torch.testing.assert_close(read(model, text, pieces), segments, **CLOSE)
    in_lanes = read_in_lanes(model, text, none_begin(text), SegmentMemory(model.config))
    torch.testing.assert_close(in_lanes, segments, **CLOSE)


@torch.no_grad()
def test_it_sees_as_far_as_it_is_long(text: torch.Tensor) -> None:
    """Of one layer each segment depends on itself and the memory alone; two reach back as far again."""
    for layers, reach in ((1, 1), (2, 2)):
        model = build(num_hidden_layers=layers)
        before, changed = read(model, text, SEGMENT), text.clone()
        changed[:, 2 * SEGMENT - 1] = (changed[:, 2 * SEGMENT - 1] + 1) % 61  # the last of the second segment
        differs = (read(model, changed, SEGMENT) - before).abs().amax((0, 2)).split(SEGMENT)
        last = [number for number, part in enumerate(differs) if part.max() > 1e-4][-1]
        assert last == 1 + reach


@torch.no_grad()
def test_its_size_is_bounded(text: torch.Tensor) -> None:
    model = build(5)
    memory = SegmentMemory(model.config)
    held = []
    for token in text.split(1, dim=1):
        model(token, past_key_values=memory)
        held.append(memory.layers[1].length)
        assert memory.layers[0].keys.untyped_storage().nbytes() <= 2 * memory.layers[0].keys.nbytes + 4096
    assert max(held) == 5 + SEGMENT - 1
    assert held[SEGMENT - 2 : SEGMENT + 1] == [7, 5, 6]
    assert memory.get_seq_length() == LENGTH


def test_no_gradient_flows_through_it(text: torch.Tensor) -> None:
    model = build()
    memory = SegmentMemory(model.config)
    inputs = model.get_input_embeddings()(text[:, : 2 * SEGMENT]).detach().requires_grad_()
    model(inputs_embeds=inputs[:, :SEGMENT], past_key_values=memory)
    model(inputs_embeds=inputs[:, SEGMENT:], past_key_values=memory).logits.sum().backward()
    assert inputs.grad[:, :SEGMENT].abs().max() == 0
    assert inputs.grad[:, SEGMENT:].abs().max() > 0


@torch.no_grad()
def test_a_row_that_begins_anew_forgets_and_leaves_the_others_alone(text: torch.Tensor) -> None:
    model, begins = build(12), none_begin(text)
    calm = read_in_lanes(model, text, begins, SegmentMemory(model.config))
    begins[1, 3] = 1
    found = read_in_lanes(model, text, begins, SegmentMemory(model.config))
    assert torch.equal(found[[0, 2]], calm[[0, 2]])
    assert (found[1, 24:] - calm[1, 24:]).abs().max() > 1e-2
    torch.testing.assert_close(found[1, :24], calm[1, :24])
    alone = read(model, text[1:2, 24:], SEGMENT)
    torch.testing.assert_close(found[1:2, 24:], alone, **CLOSE)


@torch.no_grad()
def test_with_a_longer_memory_than_trained_with_attention_slides(text: torch.Tensor) -> None:
    """Each token sees as far as half of those of a segment did in training, however long the memory is."""
    model = build(8)
    sliding = build(0, max_position_embeddings=64, sliding_window=8 + SEGMENT // 2)
    sliding.load_state_dict(model.state_dict())
    slid = sliding(text, use_cache=False).logits
    for pieces in (SEGMENT, 1):
        longer = read(model, text, pieces, SegmentMemory(model.config, LENGTH))
        torch.testing.assert_close(longer, slid, **CLOSE)
    in_lanes = read_in_lanes(model, text, none_begin(text), SegmentMemory(model.config, LENGTH))
    torch.testing.assert_close(in_lanes, slid, **CLOSE)
    assert SegmentMemory(model.config, 8).sight is None


@torch.no_grad()
def test_positions_stay_small_and_a_restored_memory_goes_on(text: torch.Tensor) -> None:
    model = build()
    memory, other = SegmentMemory(model.config), SegmentMemory(model.config)
    first, rest = text[:, :24], text[:, 24:]
    read_in_lanes(model, first, none_begin(first), memory)
    other.restore({name: tensor.clone() for name, tensor in memory.tensors().items()})
    expected = read_in_lanes(model, rest, none_begin(rest), memory)
    assert torch.equal(read_in_lanes(model, rest, none_begin(rest), other), expected)
    assert memory.layers[0].seen <= 2 * SEGMENT


# ---- generate()


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate_goes_past_the_context_with_it(strategy: dict, text: torch.Tensor, monkeypatch) -> None:
    model, caches = build(), []
    begin = SegmentMemory.__init__
    monkeypatch.setattr(SegmentMemory, "__init__", lambda self, *args: caches.append(self) or begin(self, *args))
    grown = model.generate(text[:, :20], max_new_tokens=30, pad_token_id=0, **{"do_sample": False, **strategy})
    assert grown.shape[1] == 50
    assert len(caches) == 1
    assert caches[0].layers[0].length < 2 * SEGMENT
    if not strategy:
        expected = read(model, grown, SEGMENT).argmax(-1)
        assert torch.equal(expected[:, 19:-1], grown[:, 20:])


def test_padding_is_not_remembered(text: torch.Tensor) -> None:
    """A row that is padded writes what it would alone, as long as the memory holds all."""
    model = build(max_position_embeddings=16)
    rows = text[:2, :9].clone()
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(rows, attention_mask=mask, **options)
    alone = model.generate(rows[1:, 3:], **options)
    assert torch.equal(together[1:, 3:], alone)
    with pytest.raises(ValueError, match="padded rows do not go with a memory"):
        model.generate(rows, attention_mask=mask, **options | {"max_new_tokens": 9})


def test_embeddings_are_read_up_to_a_segment(text: torch.Tensor) -> None:
    model, options = build(), {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    inputs = model.model.embed_tokens(text[:, : SEGMENT - 1])
    written = model.generate(inputs_embeds=inputs, **options)
    assert torch.equal(written, model.generate(text[:, : SEGMENT - 1], **options)[:, SEGMENT - 1 :])
    with pytest.raises(ValueError, match=f"inputs_embeds: {SEGMENT + 1} tokens are read in segments of {SEGMENT}"):
        model.generate(inputs_embeds=model.model.embed_tokens(text[:, : SEGMENT + 1]), **options)


def test_a_checkpointed_layer_would_fill_a_memory_twice(text: torch.Tensor) -> None:
    model = build().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing would fill a SegmentMemory twice"):
        model(text[:, :SEGMENT], labels=text[:, :SEGMENT], past_key_values=SegmentMemory(model.config))


@pytest.mark.parametrize("cache", ["static", "dynamic", "given", "none"])
def test_another_cache_can_be_asked_for(cache: str, text: torch.Tensor, monkeypatch) -> None:
    model = build(LENGTH)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(text[:, :20], **options)
    monkeypatch.setattr(SegmentMemory, "__init__", lambda *args: pytest.fail("a memory was made"))
    asked = {
        "static": {"cache_implementation": "static"},
        "dynamic": {"cache_implementation": "dynamic"},
        "given": {"past_key_values": DynamicCache(config=model.config)},
        "none": {"use_cache": False},
    }
    assert torch.equal(model.generate(text[:, :20], **options, **asked[cache]), expected)


def test_drafts_do_without(text: torch.Tensor) -> None:
    model = build(LENGTH)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(text[:1, :20], **options)
    assert torch.equal(model.generate(text[:1, :20], prompt_lookup_num_tokens=2, **options), expected)


def test_the_memory_travels_with_the_model(text: torch.Tensor, tmp_path) -> None:
    model = build(5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "segment_memory.py").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is not type(model)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(text[:, :4], **options), model.generate(text[:, :4], **options))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"memory_length": -1}, "memory_length=-1: must be at least 0"),
        ({"position_encoding": "learned"}, "memory_length=8: position_encoding='learned'"),
        ({"position_encoding": "sinusoidal"}, "set it to rope or none"),
    ],
)
def test_what_has_no_memory_is_refused(overrides: dict, named: str) -> None:
    with pytest.raises(Exception, match=named):
        build(**overrides)
