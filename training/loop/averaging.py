"""A Trainer that evaluates and saves an average of the weights, and trains on with the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..model.optimizers import shard_like
from ..system.checkpoints import reading
from ..system.run_files import missing_state
from .sharding import whole_weights

RAW_WEIGHTS = "raw_weights.pt"


class AverageCallback(TrainerCallback):
    """After each step: take its weights into the average."""

    def __init__(self, trainer: "AveragesWeights"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.take_into_average(state.global_step)


class AveragesWeights(Trainer):
    """Trainer whose model, for whoever evaluates or loads it, is the average of its weights after each step.

    From `average_start` on each step's weights count 1 - `average_decay`, and no less than their share of the steps so
    far: with a decay below 1 it is an exponential moving average without the weights of the start (EMA; Polyak and
    Juditsky 1992), with 1 the mean of all (SWA; Izmailov et al. 2018, arXiv 1803.05407). A checkpoint's model is the
    average, as the root's is; the weights that training goes on with are a file of its state.
    """

    average: dict[str, torch.Tensor] | None = None  # of the trained weights, sharded as they are; none before the start
    _sources: list[nn.Parameter]  # the weights that it is the average of, in its order
    _taken = 0  # steps that it is the average of
    _is_shown = False  # whether the model holds the average just now

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained weights, each once: a state dict has them in shards, and by their names on the disk."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        names = {weight: name for name, weight in model.state_dict(keep_vars=True).items() if weight.requires_grad}
        return ((name, weight) for weight, name in names.items())

    def _begin_average(self) -> None:
        """Take the weights as they are; at each step they are then at hand, as gathering them takes its time."""
        trained = dict(self._trained())
        self.average = {name: weight.detach().clone() for name, weight in trained.items()}
        self._sources = list(trained.values())

    @torch.no_grad()
    def take_into_average(self, step: int) -> None:
        """Count the weights after so many steps in."""
        if step <= self.args.average_start:
            self.let_go_of_average()  # a run that goes on for longer may begin it later
            return
        self._taken += 1
        if self.average is None:
            self._begin_average()
        else:
            share = max(1 - self.args.average_decay, 1 / self._taken)
            torch._foreach_lerp_(list(self.average.values()), self._sources, share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model hold the average; afterwards it has its own weights again, bit for bit."""
        if self.average is None or self._is_shown:
            yield
            return
        own = {name: weight.detach().clone() for name, weight in self._trained()}
        self._fill(self.average)
        self._is_shown = True
        try:
            yield
        finally:
            self._fill(own)
            self._is_shown = False

    @torch.no_grad()
    def _fill(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self._trained():
            weight.copy_(shard_like(weights[name].to(weight.device), weight))

    def let_go_of_average(self) -> None:
        """Be as before its start, and hold none of the model's weights."""
        self.average, self._sources, self._taken = None, [], 0

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, the average in the place of the weights."""
        with self.averaged():
            super().save_model(output_dir, _internal_call)

    def _write_checkpoint(self, aside: Path) -> None:
        if self.average is not None and not self.args.save_only_model:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            whole = whole_weights(model, is_kept=self.args.should_save)
            if self.args.should_save:
                weights = {name: whole[name].clone() for name, _ in self._trained()}
                torch.save({"taken": self._taken, "weights": weights}, aside / RAW_WEIGHTS)
        super()._write_checkpoint(aside)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.let_go_of_average()  # auto_find_batch_size begins more than once
        if checkpoint is not None and Path(checkpoint, RAW_WEIGHTS).is_file() and not missing_state(Path(checkpoint)):
            self._load_raw_weights(Path(checkpoint))

    def _load_raw_weights(self, checkpoint: Path) -> None:
        """Take the model, which is the average, for it, and give the model its own weights."""
        self._begin_average()
        with reading(str(checkpoint), "weights behind the average"):
            saved = torch.load(checkpoint / RAW_WEIGHTS, map_location="cpu", weights_only=True)
            self._taken = saved["taken"]
            self._fill(saved["weights"])
