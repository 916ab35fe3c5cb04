"""Every training argument is in one of three lists: it takes effect, it is refused, or it is transformers' business.

A field that is newer than these lists is treated as transformers' business; tests/test_fields.py walks all fields, so
that a new one is noticed when the range of versions moves.
"""

from dataclasses import MISSING, Field, fields

from ..system.errors import UserError

# What Acorn reads, or hands to a part of Trainer that its loop keeps.
TAKES_EFFECT = frozenset(
    """
    optimizer muon_learning_rate muon_momentum early_stopping_patience compile_scope peak_flops tokens_per_step
    output_dir max_steps num_train_epochs per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1
    adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor seed data_seed full_determinism
    precision force_precision bf16 fp16 tf32 use_cpu auto_find_batch_size
    average_tokens_across_devices activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps save_total_limit save_only_model
    logging_strategy logging_steps logging_first_step metric_for_best_model greater_is_better disable_tqdm log_level
    log_level_replica report_to dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context ddp_timeout
    push_to_hub hub_model_id hub_strategy hub_private_repo hub_revision hub_always_push
    """.split()
)

# What another place decides: the value that always holds is the default, and any other is refused with that place.
IN_TRAINING = "evaluation computes as training does"
OWN_EVALUATION = "the evaluation is Acorn's own, which gathers sums, not logits"
REFUSED = {
    "accelerator_config": "rows are shared out by their position; use tokens_per_step and per_device_train_batch_size",
    "batch_eval_metrics": OWN_EVALUATION,
    "bf16_full_eval": IN_TRAINING,
    "dataloader_drop_last": "every micro-batch is whole",
    "dataloader_in_order": "the order of the rows is what makes a run repeatable",
    "do_eval": "use eval_strategy, or `acorn evaluate`",
    "do_predict": "use `acorn generate`",
    "do_train": "to evaluate without training use `acorn evaluate`",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save a checkpoint already",
    "eval_accumulation_steps": OWN_EVALUATION,
    "eval_do_concat_batches": OWN_EVALUATION,
    "eval_use_gather_object": OWN_EVALUATION,
    "fp16_full_eval": IN_TRAINING,
    "hub_token": "a recipe is pushed with its run, and the token would be too; set HF_TOKEN or run `hf auth login`",
    "ignore_data_skip": "a resumed run computes its place in the data, and replays nothing",
    "include_for_metrics": OWN_EVALUATION,
    "include_num_input_tokens_seen": "metrics.jsonl counts tokens",
    "label_names": "the labels are the next tokens",
    "length_column_name": "use sampling, or packing in finetuning",
    "load_best_model_at_end": "the run directory's root holds the best model at every moment",
    "local_rank": "torchrun and accelerate launch number the processes",
    "logging_nan_inf_filter": "a loss that is not a number stops the run",
    "neftune_noise_alpha": "nothing here adds noise to embeddings; leave it out",
    "optim": "use optimizer (adamw, muon)",
    "optim_args": "use optimizer and its own flags",
    "optim_target_modules": "use optimizer",
    "parallelism_config": "use `accelerate launch --config_file training/launch/…`",
    "prediction_loss_only": OWN_EVALUATION,
    "remove_unused_columns": "rows have only what the model takes",
    "restore_callback_states_from_checkpoint": "a resumed run takes them up always",
    "resume_from_checkpoint": "use `acorn resume RUN_DIR --checkpoint …`",
    "skip_memory_metrics": "use `acorn estimate`, or the report of a finetuning run",
    "train_sampling_strategy": "use sampling (random, shuffled)",
    "use_cache": "training keeps no cache, and the saved model has it on",
}

# What Trainer and Accelerate do by themselves, as transformers documents it.
TRANSFORMERS = frozenset(
    """
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph debug deepspeed fsdp
    fsdp_config liger_kernel_config log_on_each_node project run_name save_on_each_node torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id use_liger_kernel
    """.split()
)


def refuse_other_values(args) -> None:
    """Refuse a value that would be read by nobody; the message names the place that decides."""
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in REFUSED and value != _default(field):
            raise UserError(f"{field.name}={value!r} has no effect here; {REFUSED[field.name]}")


def _default(field: Field) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()
