"""A Trainer whose checkpoints are written whole or not at all, in one form for all launches, and resumed exactly."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ExportableState

from ..system.checkpoints import (
    SAVING,
    find_checkpoint,
    is_finished,
    move_into_root,
    processes_of,
    read_state,
    reading,
    rotate,
    seal,
    write_beside,
)
from ..system.distributed import check_writer
from ..system.errors import UserError, is_disk_full
from ..system.run_files import STATE, missing_state
from ..system.shell import shell
from .sharding import OPTIMIZER_SHARDS, is_finite, load_optimizer, save_optimizer, whole_weights, without_wrappers


class ResumeCallback(TrainerCallback):
    """When training begins: intervals as today's arguments say, and the other callbacks as the checkpoint has them.

    Trainer would take the checkpoint's intervals, and forget the callbacks' counts or build them from old arguments.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)
        if self.trainer.best_is_gone:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        for callback in self.trainer.callback_handler.callbacks if state.global_step else []:
            if isinstance(callback, ExportableState):
                saved = state.stateful_callbacks.get(type(callback).__name__, {})
                vars(callback).update(saved.get("attributes", {}))


class CheckpointingTrainer(Trainer):
    """Trainer with other files: a checkpoint is the same whatever launch wrote it, and any launch goes on from it.

    Trainer's own under FSDP are no model that anyone could load. The one difference that is left is SHARDED_STATE_DICT,
    under which each process writes its own part of the optimizer's state, the largest of them.
    """

    best_is_gone = False  # of a run that goes back: see checkpoints.restore_best_model

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As in Trainer; an adapter is read before its model is shared out, as a whole model is."""
        if resume_from_checkpoint is not None and self.is_fsdp_enabled and hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, **kwargs)

    # ---- writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; a sharded model is gathered, a weight at a time, and saved as what it was before."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        weights = whole_weights(model, is_kept=self.args.should_save)
        with without_wrappers(model):
            self._save(output_dir, state_dict=weights)

    def _save_checkpoint(self, model, trial) -> None:
        """What Trainer saves, written whole or not at all, with a manifest; only then older ones are rotated away."""
        if not self.accelerator.gather(is_finite(self.model).to(self.args.device).reshape(1)).all():
            self.stop_on_nan(float("nan"))
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        aside = checkpoint.with_name(SAVING + checkpoint.name)
        self.store_flos()
        self.keep_unlogged_loss()
        best = checkpoint.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == checkpoint or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        self._write_beside(aside, lambda: self._write_checkpoint(aside), lambda: seal(aside, checkpoint))
        if self.args.push_to_hub:
            self.push_checkpoint(checkpoint)
        if self.args.should_save:
            rotate(checkpoint.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, aside: Path) -> None:
        """The files of a checkpoint, by the parts of Trainer's own `_save_checkpoint`; the state comes last."""
        args = self.args
        self.save_model(str(aside), _internal_call=True)
        if not args.save_only_model:
            if self.is_fsdp_enabled:
                in_shards = "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
                save_optimizer(self.optimizer, aside, in_shards, is_first=args.should_save)
                if args.should_save:
                    torch.save(self.lr_scheduler.state_dict(), aside / SCHEDULER_NAME)
            else:
                self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
        if args.should_save:
            for part in [*self.callback_handler.callbacks, self.control]:
                if isinstance(part, ExportableState):
                    self.state.stateful_callbacks[type(part).__name__] = part.state()
            self.state.save_to_json(str(aside / STATE))

    def _determine_best_metric(self, metrics, trial) -> bool:
        """A new best model goes to the root of the run directory at once.

        It is written beside the root and moved in file by file: the root can be loaded at every moment.
        """
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            root, aside = Path(self.args.output_dir), Path(self.args.output_dir, ".saving")
            self._write_beside(
                aside,
                lambda: self.save_model(str(aside), _internal_call=True),
                lambda: move_into_root(aside, root, self.state.global_step),
            )
        return is_best

    def _write_beside(self, aside: Path, write: Callable[[], object], finish: Callable[[], object]) -> None:
        """As `write_beside`; where the disk is full the error also says what is left."""
        try:
            write_beside(aside, write, finish, self.args)
        except Exception as error:
            if is_disk_full(error):
                error.add_note(
                    f"What was half written at step {self.state.global_step} is removed, and what was there before is "
                    f"whole: `{shell('acorn', 'resume', Path(self.args.output_dir))}` goes on from it"
                )
            raise

    def _finalize_training(self, *args):
        """As in Trainer, which with save_total_limit=1 would remove the last checkpoint, and the way to go on."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    # ---- resuming

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """As in Trainer; a sharded model was read whole, before it was shared out."""
        if not isinstance(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), FSDPModule):
            with reading(checkpoint, "weights"):
                super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The checkpoint's state under today's learning rates and decay, which the state would silently replace."""
        if checkpoint is None:
            return
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        groups = [{key: v for key, v in group.items() if key != "params"} for group in self.optimizer.param_groups]
        rates = list(getattr(schedule, "base_lrs", []))
        if not set(missing_state(Path(checkpoint))) - {"random state"}:
            with reading(checkpoint, "optimizer state"):
                self._load_any_optimizer(checkpoint)
        elif hasattr(schedule, "lr_lambdas"):  # a fresh optimizer, on the schedule's own step
            schedule.last_epoch = read_state(Path(checkpoint))["global_step"]
        if not hasattr(schedule, "lr_lambdas"):  # a rate that follows the losses is state, not an argument
            for group in groups:
                group.pop("lr")
        for group, today in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(today)
        if hasattr(schedule, "lr_lambdas"):
            schedule.base_lrs = rates
            for group, rate, shape in zip(self.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
                group["lr"] = rate * shape(schedule.last_epoch)

    def _load_any_optimizer(self, checkpoint: str) -> None:
        """What any launch wrote (ZeRO's own form is ZeRO's alone)."""
        is_plain = not self.is_fsdp_enabled and not Path(checkpoint, OPTIMIZER_SHARDS).is_dir()
        if is_plain or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As in Trainer; on another number of processes, for which there are no states, dropout draws anew."""
        before = processes_of(Path(checkpoint)) if checkpoint else 0
        if before in (0, self.args.world_size):
            with reading(checkpoint, "random state"):
                return super()._load_rng_state(checkpoint)
        set_seed(self.args.seed + self.state.global_step)  # the seed alone would repeat the masks of the first steps
        if self.is_world_process_zero():
            print(f"{before} → {self.args.world_size} processes: every step keeps its samples; dropout, if any, draws "
                  "other masks than in an uninterrupted run", file=sys.stderr)  # fmt: skip

    def keep_unlogged_loss(self) -> None:
        """Note each process's summed loss since the last log, so that a resumed run logs the very same mean."""
        losses = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        self.console.unlogged = {"losses": losses, "since": self._globalstep_last_logged}

    def restore_unlogged_loss(self, losses: list[float], since: int) -> None:
        """Go on with what `keep_unlogged_loss` noted; on another number of processes each takes the mean."""
        is_same = len(losses) == self.args.world_size
        self._tr_loss += losses[self.args.process_index] if is_same else math.fsum(losses) / len(losses)
        self._globalstep_last_logged = since

    def stop_on_nan(self, loss: float) -> None:
        """Raise UserError: training on would only spoil more."""
        raise UserError(
            f"loss is {loss} at step {self.state.global_step + 1}: training stopped, the checkpoints in "
            f"{self.args.output_dir} are older; lower learning_rate (or use bf16 instead of fp16) and resume"
        )


def choose_checkpoint(run_dir: Path, wanted: str, fresh_state: bool, args) -> Path | None:
    """The checkpoint to go on from; one that lacks a part of its state is refused, unless that may start afresh."""
    checkpoint = find_checkpoint(run_dir, wanted)
    if checkpoint is None:
        if is_finished(run_dir):  # it would begin anew, over the model that is there
            another = f"--model_name_or_path {shell(run_dir)} begins another run with its model"
            raise UserError(f"{run_dir}: is finished and has no checkpoint to go on from; {another}")
        return None
    check_writer(checkpoint, args)
    missing = " and no ".join(missing_state(checkpoint))
    if missing and not fresh_state:
        raise UserError(
            f"{checkpoint} holds no {missing} (saved with --save_only_model?), so the run cannot continue exactly; "
            "give --fresh_state true to start them afresh"
        )
    if missing:
        print(f"{checkpoint} holds no {missing}: starting afresh", file=sys.stderr)
    return checkpoint
