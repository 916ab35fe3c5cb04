"""GPTConfig: the one strict place where every architecture choice is named, defaulted and checked."""

import copy
import inspect
import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .kv_quantization import check_kv_quantization
from .latent_attention import check_latents
from .positions import check_rope
from .segment_memory import memory_obstacle

CHOICES = {
    "position_encoding": ("learned", "sinusoidal", "rope", "none"),
    "norm": ("layer_norm", "rms_norm"),
    "norm_order": ("pre", "post"),
    "hidden_act": ("gelu_new", "gelu", "relu", "relu2", "silu"),
    "residual_init": ("scaled", "zero", "normal"),
    "linear_attention": ("elu", "gated_delta"),
}
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
OLD_MODEL_TYPE = "gpt"
AUTO_MAP = {
    "AutoConfig": "configuration_gpt.GPTConfig",
    "AutoModel": "modeling_gpt.GPTModel",
    "AutoModelForCausalLM": "modeling_gpt.GPTForCausalLM",
}


@strict
class GPTConfig(PreTrainedConfig):
    """Architecture of a GPT; the defaults are GPT-2 small.

    vocab_size, hidden_size, num_hidden_layers, num_attention_heads: the shape; all positive.
    num_key_value_heads: fewer than the query heads is grouped-query attention, one is multi-query; default: as many.
    head_dim: size of one head; default `hidden_size / num_attention_heads`.
    intermediate_size: width of the MLP; default `4 * hidden_size`.
    max_position_embeddings: context length in tokens.
    position_encoding: `learned`, `sinusoidal`, `rope` or `none`; rope_parameters as in transformers, for all layers or
        by layer type.
    norm, norm_eps, norm_gain, norm_order: kind of norm, its epsilon, whether it has a gain, and whether it comes
        before the sub-layer (GPT-2) or after the residual sum (GPT-1).
    qk_norm: RMS norm of queries and keys per head; embedding_norm: a norm before the first block.
    hidden_act, gated_mlp: activation of the MLP, and whether a second projection multiplies it (GLU).
    layer_types: one of `full_attention`, `sliding_attention`, `linear_attention` a layer; `sliding_window` in tokens.
    linear_attention: kind of linear layers, `elu` (arXiv 2006.16236) or `gated_delta` (arXiv 2412.06464);
        linear_conv_kernel_dim: tokens that a convolution of their queries, keys and values mixes (default: none).
    kv_sharing_modes: None, "store" or "reuse" a layer; "reuse" takes the keys and values of the nearest "store"
        of its own layer type below it (cross-layer attention, arXiv 2405.12981).
    kv_quantization: `int2`, `int3` or `int4`: keys and values are quantized in training, and held so by the cache; a
        scale serves kv_quantization_group channels of a head, a power of two (default: up to 64), see
        kv_quantization.py.
    kv_lora_rank: size of the one latent a token that all keys and values of a layer come from (multi-head latent
        attention, arXiv 2405.04434); its heads' sizes are `qk_nope_head_dim` and `v_head_dim` (default:
        `hidden_size / num_attention_heads`), beside a rotary part of keys that the heads share, `qk_rope_head_dim`
        (default: half of that); q_lora_rank: that of the queries' bottleneck (default: none).
    bigram_vocab_size: rows of a table of hashed pairs, the token before and this one, that is added to the embeddings
        (default: none; see BigramEmbedding in positions.py).
    value_embeddings: every other softmax layer with values of its own, the last among them, adds an embedding of its
        tokens to them, by a learned factor (see ValueEmbedding in attention.py).
    memory_length: tokens before each segment of `max_position_embeddings` tokens that evaluation and generation keep
        in sight (Transformer-XL, see segment_memory.py); 0: none.
    bias: in all linear layers and LayerNorms but the head, which has `lm_head_bias`.
    initializer_range: standard deviation of linear weights; `embedding_initializer_range` of embeddings (default: the
        same); residual_init: `scaled` divides the output projections' by sqrt(2 * layers) (GPT-2), `zero` zeroes them;
        zero_init_head zeroes an untied head.
    logit_softcap: c in `c * tanh(logits / c)`.
    num_nextn_predict_layers: heads that predict so many tokens after the next one in training, as an auxiliary loss
        (multi-token prediction, see FurtherTokens in loss.py), which adds its gradient to that of the loss, and nothing
        to its value; generation and evaluation do without them.

    nanoGPT's names (`n_embd`, `n_layer`, `n_head`, `n_kv_head`, `block_size`, `dropout`) are accepted and readable.
    Values that do not fit together raise huggingface_hub's StrictDataclassClassValidationError, caused by a ValueError
    that names field, value and mend; values of a wrong type its StrictDataclassFieldValidationError.
    """

    model_type = "acorn_gpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "n_inner": "intermediate_size",
        "block_size": "max_position_embeddings",
        "n_positions": "max_position_embeddings",
        "final_logit_softcapping": "logit_softcap",  # Gemma's name, by which vLLM's head looks for it
    }
    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    position_encoding: str = "learned"
    rope_parameters: dict | None = None
    norm: str = "layer_norm"
    norm_eps: float | int = 1e-5
    norm_gain: bool = True
    norm_order: str = "pre"
    qk_norm: bool = False
    embedding_norm: bool = False
    hidden_act: str = "gelu_new"
    gated_mlp: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    linear_attention: str = "elu"
    linear_conv_kernel_dim: int | None = None
    kv_sharing_modes: list[str | None] | None = None
    kv_quantization: str | None = None
    kv_quantization_group: int | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    bigram_vocab_size: int | None = None
    value_embeddings: bool = False
    memory_length: int = 0
    bias: bool = True
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True
    embedding_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    embedding_initializer_range: float | int | None = None
    residual_init: str = "scaled"
    zero_init_head: bool = False
    logit_softcap: float | int | None = None
    num_nextn_predict_layers: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """As in transformers; models that older Acorns saved call themselves by a name that is anybody's."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == OLD_MODEL_TYPE:
            config["model_type"] = cls.model_type
        return config, kwargs

    def __post_init__(self, **kwargs):
        kwargs.pop("label_smoothing", None)  # of older Acorns: it belongs to the training, not to the model
        if self.rope_parameters is not None:
            self.rope_parameters = copy.deepcopy(self.rope_parameters)  # transformers fills in: not in the caller's
        for alias in kwargs.keys() & self.attribute_map.keys():
            # transformers would too, but after it has derived from the defaults, and past the check of the type.
            setattr(self, self.attribute_map[alias], kwargs.pop(alias))
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        by_layer_type = list(self.rope_parameters) if self.rope_layer_types() else []
        if by_layer_type:  # transformers 5.17 looks for every kind, and puts a theta for all beside them
            self.rope_parameters = {kind: {} for kind in self.layer_types} | self.rope_parameters
        super().__post_init__(**kwargs)
        if by_layer_type:
            self.rope_parameters = {key: self.rope_parameters[key] for key in by_layer_type}
        if self.kv_lora_rank is not None:
            self._derive_latent_heads()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % max(self.num_attention_heads, 1) == 0:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.kv_quantization is not None and self.kv_quantization_group is None and self.head_dim:
            self.kv_quantization_group = min(self.head_dim & -self.head_dim, 64)  # its largest power of two
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.position_encoding != "rope" and (self.rope_parameters or {}).keys() <= {"rope_theta", "rope_type"}:
            self.rope_parameters = None  # transformers fills its defaults in, which would say "rope" to a reader
        self.auto_map = dict(AUTO_MAP)
        self.base_model_tp_plan = self._tensor_parallel_plan()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; fields among kwargs are derived from and checked as if they stood in the dictionary."""
        own = {name: kwargs.pop(name) for name in [*kwargs] if cls.attribute_map.get(name, name) in FIELDS}
        config_dict = config_dict | {cls.attribute_map.get(name, name): value for name, value in own.items()}
        kinds, window = config_dict.get("layer_types"), own.get("sliding_window")
        if kinds and window is not None and "sliding_attention" not in kinds:
            raise ValueError(f"sliding_window={window}: no layer is sliding_attention; give layer_types, too")
        return super().from_dict(config_dict, **kwargs)

    def _derive_latent_heads(self):
        """Sizes that were not given; `head_dim` and `num_key_value_heads` are those of the keys that a cache holds."""
        usual = self.hidden_size // max(self.num_attention_heads, 1)
        for field, size in (("qk_nope_head_dim", usual), ("v_head_dim", usual), ("qk_rope_head_dim", usual // 4 * 2)):
            if getattr(self, field) is None:
                setattr(self, field, size)
        if self.head_dim is None:
            self.head_dim = self.qk_rope_head_dim
        if self.num_key_value_heads is None:
            self.num_key_value_heads = 1

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How devices share each linear layer of a block; there is no plan for a pipeline of stages.

        An inner stage would take what it receives for embeddings, and add positions to it again.
        """
        if self.kv_quantization is not None:
            return {}  # its biases are of all heads
        split = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
        if "linear_attention" in self.layer_types or self.value_embeddings:
            split = {}  # what goes with the heads, gates and convolution or a table, is not split
        if self.kv_lora_rank is not None:  # every device has the latents
            into_heads = "q_proj" if self.q_lora_rank is None else "q_b_proj"
            split = {into_heads: "colwise", "kv_b_proj": "colwise", "o_proj": "rowwise"}
        widened = {"up_proj": "colwise", "down_proj": "rowwise", **({"gate_proj": "colwise"} if self.gated_mlp else {})}
        attention = {f"layers.*.self_attn.{name}": how for name, how in split.items()}
        return attention | {f"layers.*.mlp.{name}": how for name, how in widened.items()}

    @property
    def dropout(self) -> float | int:
        """nanoGPT's one dropout; setting it sets embedding, attention and residual dropout."""
        return self.residual_dropout

    @dropout.setter
    def dropout(self, rate: float | int) -> None:
        self.embedding_dropout = self.attention_dropout = self.residual_dropout = rate

    def validate_choices(self):
        """Refuse a name that is in no table."""
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r}: choose one of {', '.join(choices)}")
        for layer_type in self.layer_types:
            if layer_type not in LAYER_TYPES:
                raise ValueError(f"layer_types has {layer_type!r}: each is one of {', '.join(LAYER_TYPES)}")

    def validate_heads(self):
        """Refuse heads that do not divide what they share."""
        check_latents(self)
        self.refuse_below_one("hidden_size", "num_attention_heads", "num_key_value_heads")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={heads}: "
                "change one of them, or give head_dim"
            )
        self.refuse_below_one("head_dim")
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}: choose a divisor"
            )
        if self.position_encoding == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rope rotates pairs, so it must be even")
        if self.position_encoding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size}: sinusoidal positions come in pairs, so it must be even")

    def validate_kv_quantization(self):
        """Refuse groups that do not divide a head, and heads that do not fill bytes."""
        check_kv_quantization(self)

    def validate_positions(self):
        """Refuse rotary parameters that nobody would read, and unknown or incomplete ones."""
        parameters = self.rope_parameters or {}
        if self.position_encoding != "rope":
            if parameters:
                raise ValueError(
                    f"rope_parameters is set but position_encoding={self.position_encoding!r}: "
                    "set it to rope, or drop them"
                )
            return
        if not self.rope_layer_types():
            check_rope(parameters, "rope_parameters")
        elif missing := set(self.layer_types) - parameters.keys():
            raise ValueError(f"rope_parameters: has nothing for {missing.pop()}; give each kind of layer_types its own")
        elif others := parameters.keys() - set(LAYER_TYPES):
            raise ValueError(f"rope_parameters.{others.pop()}: stands beside layer types; put it into each of them")
        for layer_type in self.rope_layer_types():
            if not isinstance(parameters[layer_type], dict):
                raise ValueError(f"rope_parameters.{layer_type}={parameters[layer_type]!r}: must be a mapping")
            check_rope(parameters[layer_type], f"rope_parameters.{layer_type}")

    def validate_memory(self):
        """Refuse a memory that this architecture cannot have."""
        if self.memory_length < 0:
            raise ValueError(f"memory_length={self.memory_length}: must be at least 0")
        if self.memory_length and (obstacle := memory_obstacle(self)):
            raise ValueError(f"memory_length={self.memory_length}: {obstacle}")

    def rope_layer_types(self) -> list[str]:
        """The kinds of layers that rotate each in a way of their own; none where all rotate alike."""
        return [kind for kind in LAYER_TYPES if kind in (self.rope_parameters or {})]

    def validate_sizes(self):
        """Refuse sizes, rates and ranges outside their range."""
        self.refuse_below_one("vocab_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
        if self.bigram_vocab_size is not None:
            self.refuse_below_one("bigram_vocab_size")
        if not 0 <= (heads := self.num_nextn_predict_layers) < self.max_position_embeddings:
            raise ValueError(f"num_nextn_predict_layers={heads}: must be at least 0 and below max_position_embeddings")
        for field in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be in [0, 1)")
        for field in ("initializer_range", "embedding_initializer_range", "norm_eps"):
            if not 0 <= (getattr(self, field) or 0) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)}: must not be negative, and a finite number")
        if not 2 <= (kernel := 2 if self.linear_conv_kernel_dim is None else self.linear_conv_kernel_dim) <= 64:
            raise ValueError(f"linear_conv_kernel_dim={kernel}: must be from 2 to 64, or null for none")
        if self.logit_softcap is not None and not 0 < self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap={self.logit_softcap}: must be above 0, or null for none")
        if self.zero_init_head and self.tie_word_embeddings:
            raise ValueError("zero_init_head=true needs tie_word_embeddings=false: a tied head is the embedding")

    def refuse_below_one(self, *fields: str):
        """Raise ValueError for the first of these fields that is below one."""
        for field in fields:
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")

    def validate_layer_type(self):  # in place of transformers' own, which would speak first and name no mend
        """Refuse per-layer lists of another length, windows without size and sharing without source."""
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}: "
                "give one a layer"
            )
        for field, unset in (("linear_attention", "elu"), ("linear_conv_kernel_dim", None)):
            if getattr(self, field) != unset and "linear_attention" not in self.layer_types:
                raise ValueError(f"{field}={getattr(self, field)!r}: no layer of layer_types is linear_attention")
        if self.value_embeddings and set(self.layer_types) == {"linear_attention"}:
            raise ValueError("value_embeddings=true: no layer of layer_types is softmax attention; leave it out")
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 2):
            # Of a window of 1 a cache keeps the last 0 tokens, which transformers slices as all of them.
            raise ValueError(f"sliding_window={self.sliding_window}: sliding_attention needs a window of at least 2")
        if self.kv_sharing_modes is not None:
            self._validate_kv_sharing()

    def _validate_kv_sharing(self):
        if len(self.kv_sharing_modes) != self.num_hidden_layers:
            raise ValueError(
                f"kv_sharing_modes has {len(self.kv_sharing_modes)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}: give one a layer"
            )
        for layer_idx, mode in enumerate(self.kv_sharing_modes):
            if mode not in (None, "store", "reuse"):
                raise ValueError(f"kv_sharing_modes[{layer_idx}]={mode!r}: each is null, store or reuse")
            if mode is not None and self.layer_types[layer_idx] == "linear_attention":
                raise ValueError(f"kv_sharing_modes[{layer_idx}]={mode!r}: linear_attention has no keys to share")
            if mode == "reuse" and self.kv_source(layer_idx) is None:
                raise ValueError(
                    f"kv_sharing_modes[{layer_idx}]='reuse' has no 'store' layer below it that is "
                    f"{self.layer_types[layer_idx]} too: shared keys need the same layer type"
                )

    def kv_source(self, layer_idx: int) -> int | None:
        """Index of the layer whose keys and values `layer_idx` reuses, or None: the nearest below of its own type.

        So the few layers that see everything share theirs past the sliding ones between them.
        """
        own = self.layer_types[layer_idx]
        below = range(layer_idx - 1, -1, -1)
        return next((i for i in below if self.kv_sharing_modes[i] == "store" and self.layer_types[i] == own), None)

    def value_embedding_layers(self) -> list[int]:
        """The layers that `value_embeddings` means, from the last down."""
        sharing = self.kv_sharing_modes or [None] * self.num_hidden_layers
        layers = zip(self.layer_types, sharing, strict=True)
        own = [i for i, (kind, mode) in enumerate(layers) if kind != "linear_attention" and mode != "reuse"]
        return own[::-2] if self.value_embeddings else []


FIELDS = inspect.get_annotations(GPTConfig)  # without those that all configurations have

__all__ = ["GPTConfig"]
