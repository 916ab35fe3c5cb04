"""The model, read from top to bottom: norm, MLP, block, GPTModel, GPTForCausalLM."""

import math

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import SoftmaxAttention, ValueEmbedding, build_masks
from .compat import CACHE_NAME, KVSharingDict, given_cache, layers_name, warn_beyond_range
from .configuration_gpt import AUTO_MAP, GPTConfig
from .kv_quantization import KVQuantizer, build_cache
from .latent_attention import LatentAttention
from .linear_attention import ShortConvolution, build_linear_attention, forget_bias, with_state_layers
from .loss import FurtherTokens, causal_lm_loss, shifted
from .positions import BigramEmbedding, NoPositions, build_positions, no_bigrams
from .segment_memory import SegmentMemory, refuse_padding

logger = logging.get_logger(__name__)


def layer_norm(config: GPTConfig) -> nn.Module:
    """Mean and variance normalised (arXiv 1607.06450); its bias follows `config.bias`."""
    return nn.LayerNorm(config.hidden_size, config.norm_eps, config.norm_gain, bias=config.bias)


def rms_norm(config: GPTConfig) -> nn.Module:
    """Root mean square normalised (arXiv 1910.07467)."""
    return nn.RMSNorm(config.hidden_size, config.norm_eps, config.norm_gain)


class MLP(nn.Module):
    """Two projections around an activation: (…, hidden_size) to the same shape."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.act_fn = ACT2FN[ACTIVATIONS.get(config.hidden_act, config.hidden_act)]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)
        self.down_proj.is_residual_projection = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GatedMLP(MLP):
    """The activation of one projection multiplies another (GLU variants, arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class PreNormBlock(GradientCheckpointingLayer):
    """Attention and MLP, each on normed input and added to the residual stream (GPT-2)."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        attention = LATENT_ATTENTION if config.kv_lora_rank else ATTENTION
        self.self_attn = attention[config.layer_types[layer_idx]](config, layer_idx)
        self.mlp = (GatedMLP if config.gated_mlp else MLP)(config)
        self.attn_norm = NORMS[config.norm](config)
        self.mlp_norm = NORMS[config.norm](config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """hidden_states: (batch, tokens, hidden_size), positional so that checkpointing sees its gradient."""
        attended, _ = self.self_attn(self.attn_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class PostNormBlock(PreNormBlock):
    """The norm follows each residual sum (GPT-1 and the first Transformer)."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = self.attn_norm(hidden_states + self.dropout(attended))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


# What a config's names pick, once, at construction.
NORMS = {"layer_norm": layer_norm, "rms_norm": rms_norm}
BLOCKS = {"pre": PreNormBlock, "post": PostNormBlock}
ATTENTION = {
    "full_attention": SoftmaxAttention,
    "sliding_attention": SoftmaxAttention,
    "linear_attention": build_linear_attention,
}
LATENT_ATTENTION = {"full_attention": LatentAttention, "sliding_attention": LatentAttention}  # with kv_lora_rank
# The same function of the same name, fused by torch; transformers' own is seven element-wise kernels.
ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}


class GPTPreTrainedModel(PreTrainedModel):
    """Initialisation, capabilities and saving, shared by GPTModel and GPTForCausalLM."""

    config: GPTConfig
    config_class = GPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # heads of training, wherever they are not asked for
    _skip_keys_device_placement = ["past_key_values", "cache", "shared_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PreNormBlock,
        "attentions": SoftmaxAttention,
    }

    def __init__(self, config: GPTConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        warn_beyond_range()
        # Only the block that is there: Accelerate's FSDP refuses a name that no module has.
        self._no_split_modules = [BLOCKS[config.norm_order].__name__]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            self._init_linear(module)
        elif isinstance(module, nn.Embedding):
            std = self.config.embedding_initializer_range
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range if std is None else std)
            if isinstance(module, ValueEmbedding | BigramEmbedding):
                module.init_weights()
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            if module.weight is not None:
                init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, NoPositions | ShortConvolution | KVQuantizer):
            module.init_weights()

    def _init_linear(self, linear: nn.Linear) -> None:
        """Normal weights, with the output projections scaled or zeroed as `residual_init` says, and zero biases."""
        std = self.config.initializer_range
        if getattr(linear, "is_residual_projection", False):
            std *= {"scaled": 1 / math.sqrt(2 * self.config.num_hidden_layers), "zero": 0.0, "normal": 1.0}[
                self.config.residual_init
            ]
        if getattr(linear, "is_head", False) and self.config.zero_init_head:
            std = 0.0
        init.normal_(linear.weight, mean=0.0, std=std) if std else init.zeros_(linear.weight)
        if linear.bias is not None:
            init.zeros_(linear.bias)
        if getattr(linear, "is_forget_gate", False):
            init.copy_(linear.bias, forget_bias(linear.out_features))

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers; value embeddings get as many rows, new ones of zeros."""
        resized = super().resize_token_embeddings(*args, **kwargs)
        for embedding in self.base_model.value_embeddings.values():
            rows, old = resized.num_embeddings, embedding.weight
            kept = nn.functional.pad(old.detach()[:rows], (0, 0, 0, max(0, rows - len(old))))
            embedding.weight, embedding.num_embeddings = nn.Parameter(kept, old.requires_grad), rows
        return resized

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        """As in transformers, but not reentrant unless asked to: with shared keys and values gradients would be wrong.

        This is the name that transformers 5.17 knows; the newer activation_checkpointing_enable comes here by itself.
        """
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"] and "reuse" in (self.config.kv_sharing_modes or ()):
            raise ValueError("use_reentrant=True: gradients of shared keys and values would be wrong; leave it out")
        without_warning = getattr(super(), "_activation_checkpointing_enable", super().gradient_checkpointing_enable)
        return without_warning(settings, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; what is written always has the code, the whole `auto_map` and `use_cache=True`."""
        use_cache = self.config.use_cache
        self.config.auto_map, self.config.use_cache = dict(AUTO_MAP), True  # Trainer switches the cache off
        try:
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config.use_cache = use_cache


def default_cache(config: GPTConfig) -> Cache:
    """An empty cache of the kind that the model was trained with."""
    return SegmentMemory(config) if config.memory_length else build_cache(config)


class GPTModel(GPTPreTrainedModel):
    """Token ids to hidden states: embeddings, positions, blocks and the final norm."""

    _auto_class = "AutoModel"

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.bigrams = BigramEmbedding(config) if config.bigram_vocab_size else no_bigrams
        self.positions = build_positions(config)
        self.embed_norm = NORMS[config.norm](config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.value_embeddings = nn.ModuleDict({str(i): ValueEmbedding(config) for i in config.value_embedding_layers()})
        self.layers = nn.ModuleList(BLOCKS[config.norm_order](config, i) for i in range(config.num_hidden_layers))
        self.final_norm = NORMS[config.norm](config) if config.norm_order == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids: (batch, tokens), or inputs_embeds: (batch, tokens, hidden_size). Returns the last hidden states.

        attention_mask: (batch, keys) of ones and zeros, or ready masks by layer type. position_ids: (batch or 1,
        tokens); where they start anew within a row, and neither mask nor cache is given, what comes before is not
        attended to. cache, or past_key_values: what the layers keep of earlier tokens. Raises ValueError for both or
        neither kind of input, and for learned positions past the context.
        """
        inputs_embeds = self._embedded(input_ids, inputs_embeds)
        cache = self._cache(given_cache(cache, past_key_values), use_cache, attention_mask)
        # Only positions that were given can start anew within a row; looking for that in our own would cost each step.
        masks = build_masks(self.config, inputs_embeds, attention_mask, cache, position_ids)
        rotations = self.positions.key_rotations(cache, position_ids)
        if position_ids is None:
            position_ids = self.positions.next(inputs_embeds, cache)
        inputs_embeds = self.bigrams(inputs_embeds, input_ids, position_ids, cache)
        hidden_states = self.dropout(self.embed_norm(self.positions.add(inputs_embeds, position_ids)))
        angles = self.positions.angles(hidden_states, position_ids)
        values = {int(i): {"value_embedding": embed(input_ids)} for i, embed in self.value_embeddings.items()}
        shared_key_values = KVSharingDict()
        for i, (layer, layer_type) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_ids=position_ids,
                position_embeddings=angles[layer_type],
                shared_key_values=shared_key_values,
                rotate_keys=rotations.get(layer_type),
                **values.get(i, {}),
                **{layers_name(cache): cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states),
            **{CACHE_NAME: cache if use_cache else None},
        )

    def _cache(self, cache: Cache | None, use_cache: bool | None, attention_mask) -> Cache | None:
        """The cache with what the layers need, a new one where one is only asked for; ValueError for what it cannot."""
        if use_cache and cache is None:
            cache = default_cache(self.config)
        refuse_padding(attention_mask, cache)
        if self.gradient_checkpointing and self.training and getattr(cache, "holds_unrotated", False):
            raise ValueError(f"gradient checkpointing would fill a {type(cache).__name__} twice; leave one of them out")
        return with_state_layers(cache, self.config)

    def _embedded(self, input_ids, inputs_embeds) -> torch.Tensor:
        """The embeddings of the tokens, or those that were given in place of them; ValueError as `forward` has it."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            return self.embed_tokens(input_ids)
        if self.value_embeddings or self.config.bigram_vocab_size:
            raise ValueError("inputs_embeds: this model looks up its tokens in other tables too; give input_ids")
        return inputs_embeds


class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    """GPTModel with a language-model head, its loss and generate()."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.model = GPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.lm_head.is_head = True
        self.mtp = FurtherTokens(config) if config.num_nextn_predict_layers else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocabulary) and, with labels, the loss in nats a token.

        labels, (batch, tokens), are shifted here, shift_labels, of that shape too, are taken as they are; -100 counts
        nowhere. num_items_in_batch: how many labels the sum is divided by. return_logits=False returns the loss alone,
        which saves the memory of the logits. label_smoothing: share of the target spread over the vocabulary.
        logits_to_keep: compute only the last so many.
        """
        # Not named above: Trainer evaluates to no loss where rows lack an argument whose name has "label" in it.
        shift_labels, label_smoothing = kwargs.pop("shift_labels", None), kwargs.pop("label_smoothing", 0.0)
        has_labels = labels is not None or shift_labels is not None
        cache = given_cache(cache, past_key_values)
        if has_labels and cache is None and use_cache is None:
            use_cache = False  # a cache would also undo the separation of packed documents by position_ids
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(outputs.last_hidden_state[:, keep])
        loss = None
        if has_labels:
            how = num_items_in_batch, label_smoothing
            loss = self._loss(outputs, logits, labels, shift_labels, input_ids, position_ids, *how)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if has_labels and not return_logits else logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _loss(self, outputs, logits, labels, shift_labels, input_ids, position_ids, *how) -> torch.Tensor:
        """The loss of the next tokens; in training its gradient is that of the heads for further ones, too.

        So what is logged can be compared with an evaluation. how: causal_lm_loss's last arguments.
        """
        shift_labels = shifted(labels) if shift_labels is None else shift_labels
        loss = causal_lm_loss(logits, shift_labels, *how)
        if self.mtp is None or not self.training:
            return loss
        states, embed = outputs.last_hidden_state, self.model.embed_tokens
        further = self.mtp(states, embed, self._logits, input_ids, shift_labels, position_ids, *how)
        return loss + (further - further.detach())

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs) -> None:
        """As in transformers, but generate()'s default is the cache that the model fills without it, too.

        A memory reads a prompt in segments. It could not take drafts back, for which there is another cache.
        """
        if self.mtp is not None:
            n = self.config.num_nextn_predict_layers
            logger.warning_once(f"num_nextn_predict_layers={n}: these heads are for training; generate() drops them")
        is_default = generation_config.cache_implementation is None and model_kwargs.get(CACHE_NAME) is None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if is_default and type(model_kwargs.get(CACHE_NAME)) is DynamicCache:
            has_drafts = generation_config.is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION
            cache = (build_cache if has_drafts else default_cache)(self.config)
            if type(cache) is not DynamicCache:  # a plain one may be made ready for drafts already: it stays
                model_kwargs[CACHE_NAME] = cache
                if generation_config.is_assistant:
                    cache.activate_past_recording()
            if isinstance(cache, SegmentMemory):
                generation_config.prefill_chunk_size = cache.prefill_size(model_kwargs.get("inputs_embeds"))
        with_state_layers(model_kwargs.get(CACHE_NAME), self.config)  # generate() asks it for its length

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits, cap = self.lm_head(states), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


__all__ = ["GPTForCausalLM", "GPTModel"]
