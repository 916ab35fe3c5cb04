"""Everything is made where the model is: on the meta device, whatever lies elsewhere shows."""

import pytest
import torch

from benchmarks.placement import DROPOUT, Watch, watch

from .variants import VARIANTS, tiny_config

META = torch.device("meta")
# transformers' own: it counts on the CPU, then moves what it has; and packed documents are looked for.
THEIRS = "modeling_rope_utils.py"


def ours(noted: list[str]) -> list[str]:
    return [line for line in noted if THEIRS not in line]


@pytest.mark.parametrize("name", VARIANTS)
def test_training_and_decoding_stay_on_the_device(name) -> None:
    watched = watch(tiny_config(**{**VARIANTS[name], **DROPOUT}), META, in_full=False)
    assert ours(watched.strays) == []
    assert [line for line in ours(watched.looks) if "masking_utils.py" not in line] == []


@pytest.mark.parametrize("name", ["gpt2", "grouped_query", "shared_kv_rope"])
def test_eager_attention_and_generate_stay_on_the_device(name) -> None:
    assert ours(watch(tiny_config(**{**VARIANTS[name], **DROPOUT}), META, "eager").strays) == []


def test_a_stray_and_a_look_are_noted() -> None:
    with Watch("meta") as watched:
        torch.arange(3)
        torch.zeros((), device="cpu")
        assert torch.zeros((), device="meta").item() == 1
    assert len(watched.strays) == len(watched.looks) == 1
    assert "arange" in watched.strays[0] and "tests/test_placement.py:" in watched.strays[0]
