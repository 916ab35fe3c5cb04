"""One dial for size: from `depth` follow a model's shape, its batch and steps, its learning rates and their decay.

The shape is nanochat's: 64 of width a layer. Text: 20 tokens a parameter (arXiv 2203.15556), and none of it more than
four times, up to which repeated text is worth about what new text is (arXiv 2305.16264). Batch: arXiv 2503.04715.
Weight decay: the share of a run that a weight remembers, 1 / (rate * decay * steps), follows from the tokens a
parameter alone; that was found with AdamW and a linear decay to zero (arXiv 2505.13738), and is taken for Muon's
matrices too. Muon's updates have a spectral norm that goes with the shape of the matrix, so their rate is the same at
every width (arXiv 2310.17813), and falls with the root of the layers, whose updates add up, as depth-muP's does (arXiv
2310.02244; it also divides the blocks' outputs by that root, which our blocks do not). That of embeddings and head,
which AdamW has together, falls with the width, as muP's does for a head (arXiv 2203.03466). Both were found at depths
1 and 2, and tried at 4.
"""

import math

from modeling import GPTConfig

from ..model.sizes import matrix_parameters
from ..system.errors import UserError
from ..system.flags import MOST

WIDTH = 64  # a layer, and a head
TOKENS_PER_PARAMETER = 20.0
MOST_EPOCHS = 4
FEWEST_STEPS = 10  # fewer teach nothing
MICRO_BATCH = 1 << 14  # tokens at once in one process: of a small model, as many as keep a GPU at work
MUON_RATE, ADAMW_RATE = 0.085, 1.57
# Shares of the run, so that they fit whatever number of steps it has.
SCHEDULE = {
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 0.75, "decay_type": "linear", "min_lr_ratio": 0.0},
    "warmup_steps": 0.05,
    "eval_steps": 0.25,
    "logging_steps": 0.025,
}
# What a recipe says of another size, and a depth that comes by flag replaces.
SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "intermediate_size",
    "initializer_range",
)
HORIZON = (
    "max_steps",
    "tokens_per_step",
    "per_device_train_batch_size",
    "learning_rate",
    "muon_learning_rate",
    "weight_decay",
)
OTHER_WORDS = ("gradient_accumulation_steps", "num_train_epochs", "save_steps")  # that say the same in another way
REPLACED = {"model": SHAPE, "training": (*HORIZON, *SCHEDULE, *OTHER_WORDS)}


def shape_of(depth: int) -> dict:
    """GPTConfig arguments: layers, width, heads, and the standard deviation of weights of this width."""
    width = WIDTH * depth
    return {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": depth,
        "initializer_range": _rounded(0.5 / width**0.5),
    }


def block_parameters(config: GPTConfig) -> int:
    """Weights of the blocks' matrices: what the scaling laws count, whatever the vocabulary."""
    return matrix_parameters(config) - config.vocab_size * config.hidden_size


def batch_rows(tokens: float, context: int) -> int:
    """Sequences a step of a run over so many tokens: 0.58 * tokens^0.571 tokens, as a power of two of sequences."""
    return 2 ** max(0, round(math.log2(0.58 * tokens**0.571 / context)))


def muon_rates(depth: int) -> dict:
    """That of the blocks' matrices, and that of the rest."""
    return {
        "muon_learning_rate": _rounded(MUON_RATE / depth**0.5),
        "learning_rate": _rounded(ADAMW_RATE / (WIDTH * depth)),
    }


def adamw_rates(depth: int) -> dict:
    """One rate for all weights: GPT-3 small's 6e-4 (arXiv 2005.14165), by the width as muP's of hidden matrices."""
    return {"learning_rate": _rounded(6e-4 * 768 / (WIDTH * depth))}


RATES = {"muon": muon_rates, "normuon": muon_rates, "adamw": adamw_rates}
RATES_OF = ("learning_rate", "muon_learning_rate")


def weight_decay(rate: float, steps: int, tokens_per_parameter: float) -> float:
    """The decay at whose peak rate a weight's memory is a share of the run, 1.084 * tokens_per_parameter^-0.527."""
    return _rounded(tokens_per_parameter**0.527 / (1.084 * rate * steps)) if rate else 0.0


class Dial:
    """The dial of one recipe: what the recipe and its flags say stays as they say it, and the rest follows.

    It sets the shape at once, and the training with each `turn`; `words` says what it chose, and why.
    """

    def __init__(self, recipe):
        self.recipe, self.words = recipe, ""
        self.depth, self.ratio = recipe.model["depth"], recipe.model.get("tokens_per_parameter", TOKENS_PER_PARAMETER)
        shape = shape_of(self.depth)
        refuse_other_sizes(recipe.model, shape)
        refuse_epochs(recipe.training, self.depth)
        self.said = {key: value for key, value in recipe.training.items() if value is not None}
        self.chosen = {"model": shape.keys() - recipe.model.keys(), "training": set()}
        recipe.model.update({key: value for key, value in shape.items() if key in self.chosen["model"]})
        config = recipe.model_config()
        self.context, self.parameters = config.max_position_embeddings, block_parameters(config)

    def turn(self, text: int | None = None) -> dict:
        """Choose the training for a text of so many tokens (None: of as many as are wanted); return what was chosen."""
        wanted = self.ratio * self.parameters
        self._refuse_many(wanted)
        tokens = wanted if text is None else min(wanted, MOST_EPOCHS * text)
        step = self.said.get("tokens_per_step") or self.context * batch_rows(tokens, self.context)
        steps = self.said.get("max_steps", -1)
        if steps < 1:
            steps = round(tokens / step)
            self._refuse_few(steps, step, wanted, text)
        rates = self._rates() | self.said
        rate = rates.get("muon_learning_rate", rates["learning_rate"])
        values = {
            "max_steps": steps,
            "tokens_per_step": step,
            "per_device_train_batch_size": micro_batch(step // self.context, self.context),
            **{key: rates[key] for key in RATES_OF if key in rates},
            "weight_decay": weight_decay(rate, steps, steps * step / self.parameters),
            **SCHEDULE,
        }
        if "lr_scheduler_type" in self.said:  # whose settings are not those of ours
            del values["lr_scheduler_kwargs"]
        chosen = {key: value for key, value in values.items() if key not in self.said}
        self.chosen["training"] = set(chosen)
        self.recipe.training.update(chosen)
        self.words = self._describe(self.recipe.training, rates, steps * step, text)
        return chosen

    def withdraw(self) -> None:
        """Leave the recipe with what was said, as it was before."""
        for section, keys in self.chosen.items():
            for key in keys:
                getattr(self.recipe, section).pop(key, None)

    def _rates(self) -> dict:
        optimizer = self.said.get("optimizer", "adamw")
        if optimizer not in RATES:
            known = " or ".join(RATES)
            raise UserError(f"depth={self.depth}: knows no learning rates of optimizer={optimizer!r}; take {known}")
        return RATES[optimizer](self.depth)

    def _refuse_many(self, tokens: float) -> None:
        """Refuse more steps, or more tokens in one, than a flag can say, whatever the text."""
        step = self.said.get("tokens_per_step") or self.context * batch_rows(min(tokens, MOST**2), self.context)
        steps = tokens / step if self.said.get("max_steps", -1) < 1 else 0
        if max(step, steps) > MOST:
            why = f"are {tokens:.3g} tokens, and a run has at most {MOST:,} steps, of at most as many"
            raise UserError(f"tokens_per_parameter={self.ratio:g}: {why}; lower it")

    def _refuse_few(self, steps: int, step: int, wanted: float, text: int | None) -> None:
        """Refuse a run that would teach nothing, and say what would make it longer."""
        if steps >= FEWEST_STEPS:
            return
        if text is None or wanted <= MOST_EPOCHS * text:
            why, more = (
                f"{self.ratio:g} tokens for each of {self.parameters:,} parameters",
                "raise tokens_per_parameter",
            )
        else:
            times, more = f"{wanted / text:,.0f} times; {MOST_EPOCHS} times, the most,", "give more text"
            why = f"would read the {text:,} tokens of this text {times}"
        less = "lower tokens_per_step" if step > self.context else "lower block_size"
        mend = f"{more}, {less}, or say --max_steps instead"
        raise UserError(f"depth={self.depth}: {why} are {steps} steps of {step:,} tokens; {mend}")

    def _describe(self, training: dict, rates: dict, tokens: int, text: int | None) -> str:
        each = f"{tokens / self.parameters:.3g} tokens for each of {self.parameters:,} parameters in the blocks"
        each += f", {tokens / text:.3g} epochs of the text" if text else ", if the text is that long"
        if text and "max_steps" not in self.said and self.ratio * self.parameters > MOST_EPOCHS * text:
            full = f"{self.ratio:g} a parameter would be {self.ratio * self.parameters / text:,.0f} epochs"
            each += f" ({full}; after {MOST_EPOCHS} repeated text teaches less and less)"
        named = [f"{key} {rates[key]:g}" for key in RATES_OF if key in rates]
        return f"depth {self.depth}: {each}; {', '.join(named)}, weight_decay {training['weight_decay']:g}"


def micro_batch(rows: int, context: int) -> int:
    """Sequences at once: the largest power of two that divides a step's and is at most MICRO_BATCH tokens."""
    return math.gcd(rows, 1 << max(0, (MICRO_BATCH // context).bit_length() - 1))


def refuse_other_sizes(model: dict, shape: dict) -> None:
    """Refuse what says another size than the depth does, or has one of its own."""
    depth = model["depth"]
    mend = "leave one of them out (--depth none, if it is the recipe's)"
    if "model_name_or_path" in model:
        raise UserError(f"depth={depth}: {model['model_name_or_path']} has a size of its own; {mend}")
    for key, name in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd")):
        if model.get(key, shape[key]) != shape[key]:
            raise UserError(f"{name}={model[key]}: depth={depth} makes it {shape[key]}; {mend}")


def refuse_epochs(training: dict, depth: int) -> None:
    """Refuse a number of epochs: how often the text is read follows from the depth."""
    if training.get("num_train_epochs") is not None and training.get("max_steps", -1) < 1:
        epochs = training["num_train_epochs"]
        raise UserError(
            f"num_train_epochs={epochs:g}: depth={depth} sets the steps; say --tokens_per_parameter instead"
        )


def _rounded(value: float) -> float:
    """To the three digits that a person would write."""
    return float(f"{value:.3g}")
