"""FSDP's sharding (torch's fully_shard) over our blocks on two CPU processes, against the same model in one piece."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling import GPTForCausalLM
from training.model.optimizers import build_optimizer

from .two_processes import in_two
from .variants import tiny_config

STEPS, ROWS = 5, 4


class Arguments:
    """What the optimizers read."""

    learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon = 1e-3, 0.1, 0.9, 0.95, 1e-8
    muon_learning_rate, muon_momentum, muon_beta2 = 0.02, 0.95, 0.9

    def __init__(self, optimizer: str):
        self.optimizer = optimizer


def shard(model: GPTForCausalLM, mesh) -> GPTForCausalLM:
    """Each block is a unit of its own; the embeddings, tied to the head, are the root's."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_both(rank: int, optimizer: str, overrides: dict) -> None:
    """Five steps sharded and whole; every loss, and at the end every weight, must agree."""
    torch.manual_seed(0)
    whole = GPTForCausalLM(tiny_config(**overrides)).train().double()
    sharded = shard(copy.deepcopy(whole), init_device_mesh("cpu", (2,)))
    sizes = [p.to_local().numel() for p in sharded.parameters()]
    assert sum(sizes) <= 0.6 * whole.num_parameters(), "the weights are not shared out"
    both = [(m, build_optimizer(m, Arguments(optimizer))) for m in (whole, sharded)]
    for step in range(STEPS):
        rows = torch.randint(0, 61, (ROWS, 16), generator=torch.Generator().manual_seed(step))
        mine = rows[rank * ROWS // 2 : (rank + 1) * ROWS // 2]
        losses = []
        for (model, steps), batch in zip(both, (rows, mine), strict=True):
            loss = model(input_ids=batch, shift_labels=batch, num_items_in_batch=rows.numel()).loss
            # gradients are averaged over the processes, and each holds the loss of its own rows alone
            (loss * rows.shape[0] / batch.shape[0]).backward()
            steps.step()
            steps.zero_grad()
            losses.append(loss.detach())
        torch.distributed.all_reduce(losses[1])
        assert abs(losses[0] - losses[1]) <= 1e-6, f"step {step}: {losses}"
    for (name, a), (_, b) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert (a - b.full_tensor()).abs().max() <= 1e-6, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon"])
def test_a_sharded_model_trains_as_the_whole_one(tmp_path, optimizer) -> None:
    in_two(train_both, tmp_path, optimizer, {"tie_word_embeddings": True})


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"position_encoding": "rope", "norm": "rms_norm", "tie_word_embeddings": False},
        {"norm_order": "post", "value_embeddings": True, "bigram_vocab_size": 50},
    ],
    ids=["modern", "post-norm"],
)
def test_other_architectures_shard_too(tmp_path, overrides) -> None:
    in_two(train_both, tmp_path, "adamw", overrides)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_accelerates_fsdp_finds_the_blocks(order) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    model = GPTForCausalLM(tiny_config(norm_order=order))
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}
