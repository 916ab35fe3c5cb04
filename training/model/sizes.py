"""What a model's configuration says of its size: FLOPs a token, weights that multiply, context."""

from modeling import GPTConfig


def flops_per_token(config: GPTConfig, context_length: int | None = None) -> float:
    """FLOPs of one forward and backward pass a token: 6 a matrix parameter, and 12 a head element and key seen.

    Counts as PaLM does (arXiv 2204.02311, appendix B), the whole attention square included, with sliding windows and
    shared keys taken into account; a linear layer's state counts as head_dim keys. Embeddings look up and do not
    multiply. Each head for a further token is a matrix of twice the width, and the model's head once more.
    """
    context = context_length or config.max_position_embeddings
    attended = {
        "full_attention": context,
        "sliding_attention": min(config.sliding_window or context, context),
        "linear_attention": config.head_dim,
    }
    key_size, value_size = head_sizes(config)
    heads_size = config.num_attention_heads * (key_size + value_size)
    scores = sum(6 * heads_size * attended[layer_type] for layer_type in config.layer_types)
    further = config.num_nextn_predict_layers * config.hidden_size * (2 * config.hidden_size + config.vocab_size)
    return 6 * (matrix_parameters(config) + further) + scores


def matrix_parameters(config: GPTConfig) -> int:
    """Weights that multiply every token: the blocks' projections and the head."""
    reusing = sum(mode == "reuse" for mode in config.kv_sharing_modes or [])
    every, into_cache = (_latent_projections if config.kv_lora_rank else _head_projections)(config)
    attention = config.num_hidden_layers * every + (config.num_hidden_layers - reusing) * into_cache
    mlp = config.num_hidden_layers * (3 if config.gated_mlp else 2) * config.hidden_size * config.intermediate_size
    gated = config.layer_types.count("linear_attention") if config.linear_attention == "gated_delta" else 0
    gates = gated * config.hidden_size * (config.num_attention_heads * config.head_dim + 2 * config.num_key_value_heads)
    return attention + gates + mlp + config.vocab_size * config.hidden_size


def head_sizes(config: GPTConfig) -> tuple[int, int]:
    """Numbers of a key and of a value of one head, as attention multiplies them."""
    if config.kv_lora_rank:
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return config.head_dim, config.head_dim


def attention_numbers(config: GPTConfig) -> int:
    """Numbers a token of a layer's queries, keys, values and attended values, and of the latents they come from."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.kv_lora_rank:
        return 2 * heads * sum(head_sizes(config)) + 2 * (config.kv_lora_rank + (config.q_lora_rank or 0))
    return 2 * (heads + kv_heads) * config.head_dim


def _head_projections(config: GPTConfig) -> tuple[int, int]:
    """(weights of a layer's queries and output, weights of its keys and values, which one that reuses others lacks)."""
    heads_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return 2 * config.hidden_size * heads_size, 2 * config.hidden_size * kv_size


def _latent_projections(config: GPTConfig) -> tuple[int, int]:
    """The same where keys and values come from a latent: all but the weights into it are every layer's."""
    heads, (key_size, value_size) = config.num_attention_heads, head_sizes(config)
    into_queries, width = config.q_lora_rank or config.hidden_size, config.hidden_size
    queries = heads * key_size * into_queries + (width * config.q_lora_rank if config.q_lora_rank else 0)
    from_latent = heads * (config.qk_nope_head_dim + value_size) * config.kv_lora_rank
    return queries + from_latent + heads * value_size * width, width * (config.kv_lora_rank + config.qk_rope_head_dim)


# What configurations call the context length, the commonest first.
CONTEXT_NAMES = (
    "max_position_embeddings n_positions n_ctx max_seq_len seq_length seq_len max_seq_length max_sequence_length "
    "context_length max_context_length model_max_length block_size"
).split()


def context_of(config, default: int | None = 2048) -> int | None:
    """How many tokens a model was made to read; `default` where its configuration does not say.

    config: a configuration, or what its config.json holds. A model of more than text keeps that of its text apart.
    """
    if isinstance(config, dict):
        text = config.get("text_config") or config
        lengths = (text.get(name) for name in CONTEXT_NAMES)
    else:
        lengths = (getattr(text_config(config), name, None) for name in CONTEXT_NAMES)
    return next((length for length in lengths if isinstance(length, int) and length > 0), default)


def text_config(config):
    """The part of a configuration that is about text: all of it, for most models."""
    return config.get_text_config(decoder=True)
