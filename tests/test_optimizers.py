"""What each optimizer takes and decays, and Muon against torch's own."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from training.model.optimizers import (
    OPTIMIZERS,
    Muon,
    NorMuon,
    build_optimizer,
    decay_groups,
    orthogonalize,
    set_momentum,
)

ARGS = {
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "muon_learning_rate": 0.02,
    "muon_momentum": 0.9,
    "muon_beta2": 0.9,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
}
SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8), (8, 24)]  # tall, wide, square, and two that are stacked with the first
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


def arguments(**changes) -> SimpleNamespace:
    return SimpleNamespace(**ARGS | changes)


def names_of(model: nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def matrices(shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def muon_over(parameters: list[nn.Parameter], kind: type[Muon] = Muon, **changes) -> Muon:
    group = {"params": parameters, "use_muon": True, "lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, **changes}
    rest = {"params": [nn.Parameter(torch.ones(3))], "use_muon": False, "lr": 1e-3}
    return kind([group, rest], ADAMW)


def take_steps(optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    """Steps with gradients that depend on nothing but the step's number."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


# groups


def test_matrices_decay_and_vectors_do_not(tiny_model) -> None:
    model = tiny_model(bias=True)
    decayed, exempt = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in exempt["params"]} == {1}
    assert names_of(model, decayed) | names_of(model, exempt) == {name for name, _ in model.named_parameters()}
    assert not any("norm" in name or "bias" in name for name in names_of(model, decayed))
    assert any("embed" in name for name in names_of(model, decayed))  # as in nanoGPT


def test_frozen_parameters_are_in_no_group(tiny_model) -> None:
    model = tiny_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    for name in OPTIMIZERS:
        groups = build_optimizer(model, arguments(optimizer=name)).param_groups
        assert not any("embed_tokens" in named for group in groups for named in names_of(model, group))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_of_the_blocks_only(tiny_model, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied, position_encoding="learned", qk_norm=True)
    hidden, rest = build_optimizer(model, arguments()).param_groups
    assert (hidden["use_muon"], rest["use_muon"]) == (True, False)
    assert (hidden["lr"], hidden["momentum"], hidden["weight_decay"]) == (0.02, 0.9, 0.1)
    assert (rest["lr"], rest["weight_decay"], rest["betas"]) == (3e-3, 0.0, (0.9, 0.95))
    expected = {name for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    assert names_of(model, hidden) == expected
    assert len(expected) == model.config.num_hidden_layers * 6  # q, k, v, o, up, down
    others = names_of(model, rest)
    assert others == {name for name, _ in model.named_parameters()} - expected
    assert any("embed" in name for name in others) and any("norm" in name for name in others)
    assert ("lm_head.weight" in others) is not tied


def test_adamw_is_torchs(tiny_model) -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, arguments(optimizer="adamw"))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 3e-3]
    assert all(group["betas"] == (0.9, 0.95) and group["fused"] for group in optimizer.param_groups)


# Muon


def test_orthogonalize_evens_out_the_singular_values() -> None:
    stacked = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    for matrix, result in zip(stacked, orthogonalize(stacked), strict=True):
        values = torch.linalg.svdvals(result.float())
        assert values.min() > 0.6 and values.max() < 1.3  # the quintic ends between about 0.7 and 1.2
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.nn.functional.cosine_similarity((u @ v).flatten(), result.float().flatten(), dim=0) > 0.97


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (33, 7)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_torchs_muon(shape: tuple, weight_decay: float) -> None:
    ours, theirs = matrices([shape]), matrices([shape])
    start = ours[0].detach().clone()
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.95, weight_decay=weight_decay, nesterov=True, adjust_lr_fn="original"
    )
    optimizer = muon_over(ours, weight_decay=weight_decay)
    optimizer._dtype = torch.bfloat16  # as torch's, whatever this processor multiplies natively
    take_steps(optimizer, ours, range(5))
    take_steps(reference, theirs, range(5))
    moved = (theirs[0] - start).norm()
    assert (ours[0] - theirs[0]).norm() < 0.01 * moved  # bf16 keeps about 1 part in 256 of each step
    assert moved > 0.1


def test_stacked_is_one_by_one() -> None:
    together, alone = matrices(), matrices()
    take_steps(muon_over(together), together, range(4))
    for number, parameter in enumerate(alone):
        # its own gradients, as drawn in the stacked run
        optimizer = muon_over([parameter])
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            drawn = [torch.randn(other.shape, generator=generator) for other in alone]
            parameter.grad = drawn[number]
            optimizer.step()
    for stacked, single, start in zip(together, alone, matrices(), strict=True):
        assert (stacked - single).norm() < 0.01 * (single - start).norm()


def test_the_rest_is_torchs_adamw() -> None:
    ours, theirs = matrices([(5, 3), (7,)]), matrices([(5, 3), (7,)])
    optimizer = Muon([{"params": ours, "use_muon": False, "lr": 1e-2, "weight_decay": 0.3}], ADAMW)
    take_steps(optimizer, ours, range(5))
    take_steps(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.3, **ADAMW), theirs, range(5))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_schedule_reaches_both_groups() -> None:
    parameters = matrices([(8, 8)])
    optimizer = muon_over(parameters, weight_decay=0.0)
    vector = optimizer.param_groups[1]["params"][0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [parameter.detach().clone() for parameter in (*parameters, vector)]
    take_steps(optimizer, [*parameters, vector], range(2))
    schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(before, (*parameters, vector), strict=True))


def test_parameters_without_gradient_are_left_alone() -> None:
    parameters = matrices([(8, 8), (8, 8)])
    before = parameters[1].detach().clone()
    optimizer = muon_over(parameters)
    parameters[0].grad = torch.ones(8, 8)
    optimizer.step()
    assert torch.equal(parameters[1], before)


# what NorMuon does otherwise, and what changes in a run


def test_normuon_gives_each_neuron_a_step_of_one_size_and_the_whole_muons() -> None:
    ours, theirs = matrices(), matrices()
    before = matrices()
    take_steps(muon_over(ours, NorMuon, weight_decay=0.0, beta2=0.9), ours, range(1))
    take_steps(muon_over(theirs, weight_decay=0.0), theirs, range(1))
    for even, uneven, start in zip(ours, theirs, before, strict=True):
        step, muons = (even - start).detach(), (uneven - start).detach()
        assert step.norm() == pytest.approx(muons.norm().item(), rel=1e-3)
        rows = step.norm(dim=1)
        assert rows.std() < 1e-3 * rows.mean()
        assert muons.norm(dim=1).std() > 10 * rows.std()
        assert nn.functional.cosine_similarity(step, muons).min() > 0.999  # each row keeps its direction


def test_normuon_remembers_the_sizes_of_a_neurons_steps() -> None:
    (parameter,) = ours = matrices([(8, 24)])
    optimizer = muon_over(ours, NorMuon, beta2=0.5)
    take_steps(optimizer, ours, range(2))
    squares = optimizer.state[parameter]["row_squares"]
    assert squares.shape == (8,) and (squares > 0).all()
    take_steps(optimizer, ours, range(2, 3))
    assert 0.25 * squares.sum() < optimizer.state[parameter]["row_squares"].sum() < 2 * squares.sum()


def test_momentum_follows_the_step_alone(tiny_model) -> None:
    args = arguments(muon_momentum_warmup_steps=4)
    optimizer = build_optimizer(tiny_model(), args)
    hidden, rest = optimizer.param_groups
    for step, momentum in ((2, 0.875), (0, 0.85), (4, 0.9), (6, 0.9)):
        set_momentum(optimizer, args, step)
        assert hidden["momentum"] == pytest.approx(momentum)
        assert rest["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize(
    ("schedule", "end"), [("polynomial", {"lr_end": 1e-4}), ("cosine_with_min_lr", {"min_lr": 1e-4})]
)
def test_a_schedule_that_ends_at_a_rate_ends_at_its_share_of_each_rate(tiny_model, name: str, schedule, end) -> None:
    args = arguments(optimizer=name)
    optimizer = build_optimizer(tiny_model(), args)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = get_scheduler(schedule, optimizer, 0, 4, scheduler_specific_kwargs=end)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    ends = [group["lr"] for group in optimizer.param_groups]
    assert ends == pytest.approx([rate * 1e-4 / args.learning_rate for rate in rates])


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_loaded_state_goes_on_identically(tiny_model, tmp_path, name: str) -> None:
    whole, broken = tiny_model(), tiny_model()
    broken.load_state_dict(whole.state_dict())
    args = arguments(optimizer=name)
    first = build_optimizer(whole, args)
    take_steps(first, list(whole.parameters()), range(3))

    second = build_optimizer(broken, args)
    take_steps(second, list(broken.parameters()), range(2))
    torch.save(second.state_dict(), tmp_path / "optimizer.pt")
    restored = build_optimizer(broken, args)
    restored.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    take_steps(restored, list(broken.parameters()), range(2, 3))
    for (parameter_name, a), b in zip(whole.named_parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b), parameter_name
