"""Half of the cases of bad_inputs.py: values for every field, and damage to every file."""

import json
import os
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import split as words

TINY = words(
    "--n_layer 1 --n_embd 16 --n_head 2 --block_size 16 --max_steps 4 --eval_steps 2 --per_device_train_batch_size 2 "
    "--warmup_steps 1 --max_new_tokens 4 --use_cpu true"
)
PRETRAIN = ["pretrain", "shakespeare-char-cpu", "--data_dir", "tokens", *TINY, "--output_dir", "new"]
FINETUNE = words("finetune run --text_files text.txt --max_steps 2 --eval_steps 2 --max_new_tokens 4 --use_cpu true")
FINETUNE += ["--output_dir", "tuned"]
COMMANDS = (  # what the world is made by
    words("tokenizer --tokenizer bpe --tokenizer_vocab_size 280 --text_files text.txt --output_dir tokenizer"),
    words("prepare shakespeare-char-cpu --text_files text.txt --data_dir tokens"),
    [*PRETRAIN[:-1], "run"],
    [*FINETUNE[:-1], "lora"],
)


@dataclass
class Case:
    """A command, what is done to the world before it, and what may come of it.

    setup runs in the command's own process. must_refuse: success would be silence. result: of (stdout, hashes of all
    files), what a success must have in common with the command in an undamaged world. extra_lines: of notes, beside
    the one line of a refusal. is_mute: nobody can hear a word.
    """

    name: str
    kind: str
    argv: list[str]
    must_refuse: bool = False
    spoil: Callable[[Path], object] | None = None
    setup: Callable[[Path], object] | None = None
    result: Callable[[str, dict], object] | None = None
    extra_lines: int = 0
    is_mute: bool = False


def write_world(world: Path) -> None:
    """Write the text, pairs and chats that everything is made from."""
    sentence = "The quick brown fox jumps over a lazy dog, and how vexingly quick daft zebras jump.\n"
    text = "".join(sentence[number % 17 :] for number in range(120))
    (world / "text.txt").write_text(text)
    pairs = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}."} for n in range(40)]
    (world / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def field_and_damage_cases() -> Iterator[Case]:
    """The cases of this module, in a fixed order."""
    yield from field_cases()
    yield from flag_cases()
    yield from damage_cases()


# ---- values for every field


# type: values that can be none, and values that may be one
NONSENSE = {
    bool: (["maybe", "2", ""], []),
    int: (["nonsense", "1.5", "nan", "inf", ""], ["-1", "0", "99999999999999999999"]),
    float: (["nonsense", "nan", ""], ["-1", "inf", "1e400"]),
    str: ([], ["", "nonsense", "a b/\u00e9\n"]),
    list: (["[1"], ["", "nonsense", "[{}]"]),
    dict: (["[1", "nonsense", "{a"], ["{nonsense: 1}"]),
}
# What costs time or a network and shows nothing more, or is no bad value.
PASSED_OVER = {("dataset", "nonsense"), ("hub_token", "nonsense")}


def values_of(hint) -> tuple[list[str], list[str]]:
    """(values that can be none, values that may be one) of a field of this type."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in kinds if kind is not type(None)]
    known = [NONSENSE[kind] for kind in kinds if kind in NONSENSE] or [NONSENSE[str]]
    never = [value for value in known[0][0] if all(value in bad for bad, _ in known)]
    return never, sorted({value for bad, maybe in known for value in (*bad, *maybe)} - set(never))


def field_cases() -> Iterator[Case]:
    """Each field of pretraining and finetuning, with each value of its type."""
    from finetune.arguments import FinetuneRecipe
    from training.config.recipe import Recipe, known_keys

    for base, kind, sections in (
        (PRETRAIN, Recipe, ("data", "training", "model", "sample", "card")),
        (FINETUNE, FinetuneRecipe, ("data", "model", "adapter", "sample")),
    ):
        for section in sections:
            for key, hint in known_keys(kind)[section].items():
                never, maybe = values_of(hint)
                for value in (*never, *maybe):
                    if (key, value) not in PASSED_OVER:
                        argv = [*without(base, key), f"--{key}={value}"]
                        name = f"{base[0]} --{key}={value!r}"
                        yield Case(name, "fields", argv, must_refuse=value in never)
                yield Case(f"{base[0]} --{key} without a value", "fields", [*without(base, key), f"--{key}"])


def without(argv: list[str], key: str) -> list[str]:
    """A command without a flag that is given anew."""
    if f"--{key}" not in argv:
        return argv
    at = argv.index(f"--{key}")
    return argv[:at] + argv[at + 2 :]


# verb: (command, {flag: type}) of those that read no recipe
FLAGS = {
    "generate": (
        ["generate", "run", "--max_new_tokens", "4"],
        dict(max_new_tokens=int, num_samples=int, temperature=float, top_k=int, top_p=float, seed=int)
        | dict(repetition_penalty=float, dtype=str, prompt=str),
    ),
    "evaluate": (
        ["evaluate", "run"],
        dict(text_files=str, data_files=str, dataset=str, dataset_config=str, dataset_split=str, text_column=str)
        | dict(block_size=int, per_device_eval_batch_size=int),
    ),
    "estimate": (["estimate", "quickstart"], dict(gpu=str, num_gpus=int, mfu=float, sharding=str)),
    "push": (
        ["push", "run", "me/gpt", "--dry_run"],
        dict(revision=str, commit_message=str, license=str, base_model=str),
    ),
    "merge": (["merge", "lora", "merged"], dict(dtype=str)),
    "convert": (["convert", "run", "converted", "--to", "nanogpt"], dict(to=str, tokenizer=str, meta=str)),
    "export": (
        ["export", "run", "made.gguf", "--format", "gguf"],
        dict(format=str, outtype=str, tokenizer=str),
    ),
    "resume": (["resume", "run", "--max_steps", "5"], dict(checkpoint=str, max_steps=int, learning_rate=float)),
    "prepare": (
        words("prepare shakespeare-char-cpu --text_files text.txt --data_dir made"),
        dict(tokenizer=str, tokenizer_vocab_size=int, validation_fraction=float, validation_by=str, shard_size=int)
        | dict(num_proc=int, on_bad_file=str, text_files=list, data_files=list, mixture=list),
    ),
    "tokenizer": (
        words("tokenizer --tokenizer bpe --tokenizer_vocab_size 280 --text_files text.txt --output_dir made"),
        dict(tokenizer=str, tokenizer_vocab_size=int, text_files=list, output_dir=str),
    ),
    "recipes": (["recipes"], {}),
}
LINES = (  # command lines that are wrong as a whole
    "|nonsense|pretrain|pretrain nonsense|pretrain --max_steps 3|pretrain quickstart stray|resume|resume nonsense|"
    "resume run --optimizer muon|resume run --n_layer 3|resume run --checkpoint|resume run --text_files text.txt|"
    "finetune|finetune nonsense|finetune run --resume|finetune --resume|finetune --resume nonsense|merge|merge run|"
    "merge run out|merge lora run|merge nonsense out|evaluate|evaluate nonsense|evaluate tokens|generate|"
    "generate nonsense|generate tokens|generate run --nonsense 1|generate run stray|convert|convert run|"
    "convert run run --to gpt2|convert nonsense out --to acorn|export|export run|export run x.gguf|"
    "export run --format gguf|export run x --format gguf|export run text.txt --format gguf|export nonsense x.gguf "
    "--format gguf|export lora x.gguf --format gguf|export run run --format gpt2|export run x --format vllm-check|"
    "export tokens --format vllm-check|export run x.gguf --format gguf --outtype q2|push|push run|push run a/b/c|"
    "push nonsense me/gpt|push tokens me/gpt|"
    "push run me/gpt --license nonsense|estimate|estimate nonsense|recipes nonsense|prepare|prepare nonsense|"
    "prepare quickstart --nonsense 1|tokenizer|tokenizer --output_dir x|tokenizer --tokenizer nonsense --output_dir x"
)


def flag_cases() -> Iterator[Case]:
    """The flags of the other verbs, and whole lines."""
    for verb, (base, flags) in FLAGS.items():
        for flag, hint in flags.items():
            never, maybe = values_of(hint)
            for value in (*never, *maybe):
                argv = [*without(base, flag), f"--{flag}={value}"]
                yield Case(f"{verb} --{flag}={value!r}", "fields", argv, must_refuse=value in never)
            yield Case(f"{verb} --{flag} without a value", "fields", [*without(base, flag), f"--{flag}"], True)
        yield Case(f"{verb} --nonsense", "fields", [*base, "--nonsense", "1"], True)
    for line in LINES.split("|"):
        yield Case(f"acorn {line}", "fields", words(line), must_refuse=bool(line))


# ---- damage to every file


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x21
    path.write_bytes(raw)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1))


DAMAGES = {"cut": cut, "flipped": flip, "emptied": empty, "of noise": noise, "gone": os.unlink}


def weights_of(*names: str) -> Callable[[str, dict], object]:
    return lambda out, after: [after.get(name) for name in names]


def printed(out: str, after: dict) -> str:
    return out


RESUMED = weights_of("run/checkpoint-6/model.safetensors", "run/checkpoint-6/optimizer.pt")
# folder: the commands that read what lies in it, and what their success is known by
READERS = {
    "run": (
        (["generate", "run", "--max_new_tokens", "8", "--temperature", "0"], printed),
        (["evaluate", "run"], printed),
        (["resume", "run", "--max_steps", "6"], RESUMED),
        (["push", "run", "me/gpt", "--dry_run"], None),
        (["convert", "run", "converted", "--to", "nanogpt"], weights_of("converted/ckpt.pt")),
        (["export", "run", "made.gguf", "--format", "gguf"], weights_of("made.gguf")),
        (["export", "run", "--format", "vllm-check"], None),
        (FINETUNE, weights_of("tuned/adapter_model.safetensors")),
    ),
    "run/checkpoint-4": (
        (["resume", "run", "--max_steps", "6"], RESUMED),
        (["resume", "run", "--checkpoint", "checkpoint-4", "--max_steps", "6"], RESUMED),
        (["generate", "run/checkpoint-4", "--max_new_tokens", "8", "--temperature", "0"], printed),
    ),
    "lora": (
        (["generate", "lora", "--max_new_tokens", "8", "--temperature", "0"], printed),
        (["merge", "lora", "merged"], weights_of("merged/model.safetensors")),
        (["resume", "lora", "--max_steps", "4"], weights_of("lora/checkpoint-4/optimizer.pt")),
        (["push", "lora", "me/gpt", "--dry_run", "--base_model", "me/base"], None),
    ),
    "tokens": (
        (PRETRAIN, weights_of("new/checkpoint-4/model.safetensors")),
        (["resume", "run", "--max_steps", "6"], RESUMED),
        (words("prepare shakespeare-char-cpu --text_files text.txt --data_dir tokens"), printed),
    ),
    "tokens/tokenizer": ((PRETRAIN, weights_of("new/checkpoint-4/model.safetensors")),),
    "tokenizer": (
        ([*words("prepare shakespeare-char-cpu --text_files text.txt --data_dir made --tokenizer tokenizer")], printed),
    ),
}
FILES = {
    "run": "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json recipe.yaml "
    "metrics.jsonl README.md sample.txt loss.png inputs.json manifest.json modeling_gpt.py attention.py",
    "run/checkpoint-4": "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json "
    "manifest.json optimizer.pt scheduler.pt rng_state.pth trainer_state.json training_args.bin modeling_gpt.py",
    "lora": "adapter_config.json adapter_model.safetensors base_model.json finetune.json inputs.json metrics.jsonl "
    "recipe.yaml tokenizer.json tokenizer_config.json README.md manifest.json",
    "tokens": "manifest.json train-00000.bin validation-00000.bin",
    "tokens/tokenizer": "tokenizer.json tokenizer_config.json",
    "tokenizer": "tokenizer.json tokenizer_config.json",
}


def damage_cases() -> Iterator[Case]:
    """Each file of a run, a checkpoint, an adapter, prepared tokens and a tokenizer, damaged in each way."""
    for folder, names in FILES.items():
        for name in names.split():
            for damage, act in DAMAGES.items():
                for argv, result in READERS[folder]:
                    what = f"{folder}/{name} {damage}: {' '.join(argv[:2])}"
                    spoil = spoiler(f"{folder}/{name}", act)
                    yield Case(what, "damage", argv, spoil=spoil, result=result, extra_lines=3)


def spoiler(name: str, act) -> Callable[[Path], object]:
    """Damages the file, or says that it is not there."""
    return lambda world: act(world / name) if (world / name).is_file() else False
