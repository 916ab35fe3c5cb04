"""A Trainer whose model reads each lane's rows with a memory of those before them, which checkpoints keep."""

from pathlib import Path

import torch
from transformers import Trainer

from modeling.compat import CACHE_NAME
from modeling.segment_memory import SegmentMemory, memory_obstacle

from ..data.dataset import LANES
from ..system.checkpoints import reading
from ..system.errors import UserError
from ..system.run_files import missing_state

MEMORY = "memory.pt"


def with_memory(memory: SegmentMemory, batch: dict[str, torch.Tensor]) -> dict:
    """A batch of rows in lanes as the model takes it: with the memory, and the mask of what each row knows of it."""
    inputs = {key: value for key, value in batch.items() if key != "begins"}
    mask = memory.begin_segment(batch["begins"], inputs["input_ids"].shape[1])
    return inputs | {"attention_mask": mask, CACHE_NAME: memory}


def warm_up(memory: SegmentMemory) -> int:
    """Rows that a lane reads until its memory is what it would be had it read the text from its beginning.

    A layer's memory reaches back by its length from that of the layer below, so it takes all of the layers' together.
    """
    first = memory.layers[0]
    return len(memory.layers) * -(-first.memory_length // first.segment_length)


def check_memory(config, data, args) -> int:
    """How many tokens of memory a run trains with; what does not go with a memory, or with lanes, is refused.

    config: the model's. data, args: DataArguments and GPTTrainingArguments.
    """
    name = "memory_length" if args.train_memory_length is None else "train_memory_length"
    length = config.memory_length if args.train_memory_length is None else args.train_memory_length
    what, in_lanes = f"{name}={length}", data.sampling == LANES
    if data.document_masking and (length or in_lanes):
        why = "rows in lanes go on from step to step, over the ends of documents"
        raise UserError(f"document_masking=True: {why}; leave one of them out")
    if in_lanes and data.streaming:
        raise UserError("sampling='lanes': a stream is read in one order; leave --streaming out, or sampling")
    if not length and args.memory_reset_probability:
        raise UserError(
            f"memory_reset_probability={args.memory_reset_probability}: has no effect without memory_length"
        )
    if not length:
        return 0
    if obstacle := memory_obstacle(config):
        raise UserError(f"{what}: {obstacle}")
    if not in_lanes:
        how = "a stream's rows" if data.streaming else f"rows of sampling={data.sampling!r}"
        raise UserError(f"{what}: {how} do not go on where those of the step before ended; give --sampling lanes")
    if args.checkpoints_activations:
        raise UserError(f"{what}: activation_checkpointing would run each block twice, and its memory would move on "
                        "twice; leave one of them out")  # fmt: skip
    if args.is_compiled:
        raise UserError(f"{what}: torch_compile would compile each length of the memory anew; leave one of them out")
    return length


class CarriesMemory(Trainer):
    """Trainer with a memory for each micro-batch of a step, whose lanes are the same in every step.

    A lane's memory is detached, and the lane's own: rows of a batch do not see each other. In a checkpoint it is one
    file for all lanes in order, so that any number of processes, and any micro-batch, goes on with it.
    """

    train_memory_length = 0  # tokens; none for rows that are not in lanes
    rows_per_step: int
    memories: list[SegmentMemory]  # empty when training begins, or begins again with a smaller micro-batch
    _micro_batch = 0  # of the step that is computed

    def get_batch_samples(self, *args, **kwargs):
        self._micro_batch = 0
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in Trainer; a row's "begins" is for the memory, and not for the model."""
        if self.train_memory_length and "begins" in inputs:
            if self._micro_batch == len(self.memories):
                self.memories.append(self._empty_memory())
            inputs = with_memory(self.memories[self._micro_batch], inputs) | {"use_cache": False}
            self._micro_batch += 1
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "begins"}, *args, **kwargs)

    def _empty_memory(self) -> SegmentMemory:
        length = self.train_memory_length
        return SegmentMemory(self.accelerator.unwrap_model(self.model).config, length, reach=length)

    # ---- checkpoints

    def _write_checkpoint(self, aside: Path) -> None:
        if self.train_memory_length and not self.args.save_only_model:
            self._write_memory(aside / MEMORY)
        super()._write_checkpoint(aside)

    def _write_memory(self, path: Path) -> None:
        """The memories of all processes, as tensors whose first axis is the lanes of a step in their order."""
        held = [memory.tensors() for memory in self.memories]
        whole = {}
        for name in held[0] if held else ():
            own = torch.stack([tensors[name] for tensors in held])  # (micro-batches, rows of one, …)
            gathered = self.accelerator.gather(own[None]) if self.args.world_size > 1 else own[None]
            if self.args.should_save:
                whole[name] = gathered.transpose(0, 1).flatten(0, 2).cpu()
        if self.args.should_save:
            torch.save(whole, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.train_memory_length and not missing_state(Path(checkpoint)):
            self._load_memory(Path(checkpoint))

    def _load_memory(self, checkpoint: Path) -> None:
        """Give each micro-batch of this process the memory of its lanes."""
        if not (checkpoint / MEMORY).is_file():
            raise UserError(f"{checkpoint} holds no {MEMORY}, so the run cannot continue exactly; choose another")
        with reading(str(checkpoint), "memory"):
            whole = torch.load(checkpoint / MEMORY, map_location="cpu", weights_only=True, mmap=True)
            lanes = len(whole["known"])
        if lanes != self.rows_per_step:
            raise UserError(f"{checkpoint} holds the memory of {lanes} lanes, and a step has {self.rows_per_step} now")
        size, args = self._train_batch_size, self.args
        for micro_batch in range(args.gradient_accumulation_steps):
            first = (micro_batch * args.world_size + args.process_index) * size
            own = {name: value[first : first + size].to(args.device) for name, value in whole.items()}
            self.memories.append(self._empty_memory())
            self.memories[-1].restore(own)
