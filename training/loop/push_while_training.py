"""`push_to_hub: true` in a recipe: a run shows itself on the Hub as it goes, and no failure of the network stops it."""

import os
import shutil
import sys
from pathlib import Path
from threading import Thread

from tqdm.auto import tqdm
from transformers.trainer_utils import HubStrategy

from ..config.publishing import repo_of
from ..share.hub import Pushed, finish_files, send, why_push_failed
from ..share.model_card import model_card
from ..share.report import card_of, facts_of
from ..share.uploads import Upload, refuse_no_model, resume_state, sort_files
from ..system.checkpoints import list_checkpoints
from ..system.errors import UserError
from ..system.shell import shell

ASIDE = ".pushing"  # in the run directory: what is on its way up, held fast while training writes on
WRITTEN_ONCE = (".safetensors", ".pt", ".pth", ".bin")  # large, and replaced by new files, never changed in place


class PushesToHub:
    """A Trainer's calls to the Hub; goes before Trainer in the bases of a class.

    Trainer's own end a run that begins without a network, put the last checkpoint over the best model at the root, and
    send pickles. Of its arguments all but hub_token work as documented there. Only the first process pushes.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Called by Trainer.__init__: nothing is asked of the network before there is a model to push."""
        self.pushes = BackgroundPushes(self.args)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Push what has been saved in the background, unless the last push is still going on."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.pushes.is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        self.pushes.start(lambda: self.files_to_push(checkpoint, is_end=False), message)

    def finish_pushes(self) -> None:
        """Wait for what is on its way."""
        if self.args.push_to_hub and self.is_world_process_zero():
            self.pushes.wait()

    def push_to_hub(self, commit_message: str = "End of training", revision: str | None = None) -> Pushed | None:
        """Push what the run directory holds now, and wait for it; where it is, or None after saying why not.

        The caller writes the report and the card first. A failure is no error: the run is whole on this disk.
        """
        if not self.is_world_process_zero():
            return None
        self.pushes.wait()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoints = list_checkpoints(Path(self.args.output_dir))
        pushed = self.pushes.push(
            lambda: self.files_to_push(checkpoints[-1] if checkpoints else None, is_end=True), commit_message, revision
        )
        if pushed is None:
            command = shell("acorn", "push", Path(self.args.output_dir), self.pushes.repo_id)
            print(f"The run is saved in {self.args.output_dir}. To push it later:\n  {command}", file=sys.stderr)
        else:
            print(f"The run is at {pushed.address}", flush=True)
        return pushed

    def files_to_push(self, checkpoint: Path | None, is_end: bool) -> list[Upload]:
        """The model at the root of the run (before the first evaluation: the checkpoint's), and what the strategy adds.

        At the end the card is the one that was written, and every checkpoint that a failure may have kept back goes.
        """
        root, strategy = Path(self.args.output_dir), self.args.hub_strategy
        has_model = any((root / name).is_file() for name in ("config.json", "adapter_config.json"))
        directory = root if checkpoint is None or has_model else checkpoint
        refuse_no_model(directory)
        card = card_of(directory) if is_end else model_card(facts_of(directory))
        files = finish_files(directory, sort_files(directory)[0], card)
        if strategy == HubStrategy.CHECKPOINT and checkpoint is not None:
            files += resume_state(checkpoint, "last-checkpoint")
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            for folder in list_checkpoints(root) if is_end else [checkpoint]:
                files += resume_state(folder, folder.name)
        return files


class BackgroundPushes:
    """Pushes one after the other, beside training; a failure is a line on stderr, and no reason to lose a run."""

    def __init__(self, args):
        self.repo_id, self.private, self.revision = repo_of(args), args.hub_private_repo, args.hub_revision
        self.aside = Path(args.output_dir, ASIDE)
        self.latest: Thread | None = None
        self.count = 0

    @property
    def is_busy(self) -> bool:
        return self.latest is not None and self.latest.is_alive()

    def start(self, choose_files, message: str) -> None:
        """Hold the files that `choose_files()` names as they are now, and push them in a thread, after those before."""
        before, self.count = self.latest, self.count + 1
        if before is None:
            shutil.rmtree(self.aside, ignore_errors=True)  # what a killed process left
        folder = self.aside / str(self.count)
        try:
            files = hold(choose_files(), folder)
        except Exception as error:
            return self._report(error, message)

        def push_held() -> None:
            if before is not None:
                before.join()
            self.push(lambda: files, message)
            shutil.rmtree(folder, ignore_errors=True)

        # A daemon, so that a network that answers nothing cannot keep a process that wants to end.
        self.latest = Thread(target=push_held, daemon=True)
        self.latest.start()

    def wait(self) -> None:
        """Wait for what is on its way; nothing is left of it in the run directory then."""
        if self.latest is not None:
            self.latest.join()
        shutil.rmtree(self.aside, ignore_errors=True)

    def push(self, choose_files, message: str, revision: str | None = None) -> Pushed | None:
        """Push now; where it is, or None after a failure."""
        try:
            return send(choose_files(), self.repo_id, message, self.private, revision or self.revision)
        except Exception as error:
            return self._report(error, message)

    def _report(self, error: Exception, message: str) -> None:
        """One line on a failure of whatever kind."""
        why = str(error) if isinstance(error, UserError) else why_push_failed(error, self.repo_id)
        tqdm.write(f"push_to_hub ({message}): {why}", file=sys.stderr)


def hold(files: list[Upload], folder: Path) -> list[Upload]:
    """The same files as they are at this moment: small ones in memory, large ones under a second name in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    held = []
    for file in files:
        content = file.content
        if isinstance(content, Path) and content.suffix in WRITTEN_ONCE:
            source, content = content.resolve(), folder / file.name
            content.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, content)
            except OSError:  # a file system without hard links
                shutil.copy2(source, content)
        elif isinstance(content, Path):
            content = content.read_bytes()
        held.append(Upload(file.name, content, file.why))
    return held
