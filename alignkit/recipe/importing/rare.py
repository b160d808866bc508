"""Keys without counterpart that few files hold: of speed, memory, logging and special models."""

from __future__ import annotations

from alignkit.recipe.importing.fields import Field

_FOUND = "found by alignkit, and changes no result"
_KERNELS = "alignkit has its own kernels"
_MANY = "several cards go through accelerate: see docs/gpu.md"
_LOGS = "metrics.jsonl has every step"
_TOKENS = "set model.add_tokens"
_VLLM = "alignkit samples itself, in the same process"
_LOSS = "alignkit does not have this loss"
_MODEL = "follows from the model"
_NO = "no such training"


def _rows(reason: str, keys: str) -> tuple[Field, ...]:
    return tuple(Field(key, None, reason) for key in keys.split())


TRAINER = (
    *_rows(_FOUND, "average_tokens_across_devices fp16_full_eval activation_checkpointing"),
    *_rows(_FOUND, "activation_checkpointing_kwargs use_cache eval_do_concat_batches"),
    *_rows(_FOUND, "eval_use_gather_object batch_eval_metrics skip_memory_metrics debug"),
    *_rows(_FOUND, "dataloader_multiprocessing_context dataloader_in_order enable_jit_checkpoint"),
    *_rows(_KERNELS, "liger_kernel_config"),
    *_rows(_LOGS, "log_on_each_node logging_nan_inf_filter log_level_replica include_for_metrics"),
    *_rows("the run folder's name", "trackio_bucket_id trackio_static_space_id"),
    *_rows(_MANY, "save_on_each_node ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph"),
    *_rows("every run is exact", "restore_callback_states_from_checkpoint"),
    *_rows("rows are read by their formats", "label_names length_column_name"),
)
"""Of transformers' TrainingArguments."""

TRL = (
    *_rows(_FOUND, "precompute_ref_batch_size generate_during_eval num_generations_eval"),
    *_rows(_FOUND, "ds3_gather_for_generation use_transformers_paged cache_implementation"),
    *_rows(_FOUND, "use_transformers_continuous_batching transformers_continuous_batching_config"),
    *_rows(_LOSS, "f_alpha_divergence_coef discopop_tau alpha"),
    *_rows(_LOSS, "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos"),
    *_rows(_LOSS, "vespo_k_neg vespo_lambda_neg off_policy_mask_threshold"),
    *_rows("the loss is computed in float32", "cast_lm_head_to_fp32"),
    *_rows("all tokens count alike", "use_adaptive_entropy entropy_coef_min entropy_coef_max"),
    *_rows("all tokens count alike", "entropy_coef_delta entropy_target"),
    *_rows("one turn is answered, without tools", "max_tool_calling_iterations"),
    *_rows("KL is k3 of the tokens", "use_bias_correction_kl"),
    *_rows(_VLLM, "vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex"),
    *_rows(_VLLM, "vllm_server_base_url vllm_server_timeout vllm_group_port"),
    *_rows(_VLLM, "vllm_max_model_length vllm_importance_sampling_mode"),
    *_rows(_VLLM, "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min"),
    *_rows(_VLLM, "vllm_importance_sampling_cap"),
    *_rows("samples.jsonl has them", "log_multimodal log_unique_prompts log_completions_hub_repo"),
    *_rows(_MODEL, "is_encoder_decoder ignore_bias_buffers"),
    *_rows("nothing is padded", "padding_value label_pad_token_id"),
    *_rows(_MANY, "accelerate_config"),
)
"""Of TRL."""

LLAMA_FACTORY = (
    *_rows(_FOUND, "low_cpu_mem_usage offload_folder data_shared_file_system print_param_status"),
    *_rows(_FOUND, "use_reentrant_gc quantization_device_map"),
    *_rows(_KERNELS, "use_v1_kernels use_mca fp8_backend fp8_enable_fsdp_float8_all_gather"),
    *_rows("the loss is computed in float32", "upcast_lmhead_output"),
    *_rows(_MODEL, "use_fast_tokenizer split_special_tokens adapter_folder enable_thinking"),
    *_rows(_TOKENS, "new_special_tokens_config init_special_tokens"),
    *_rows("write it in the rows, as system", "default_system"),
    *_rows("secrets are neither read nor written", "om_hub_token"),
    *_rows("alignkit trains on text", "video_min_pixels video_fps video_maxlen"),
    *_rows(
        "alignkit trains on text", "use_audio_in_video audio_sampling_rate freeze_language_model"
    ),
    *_rows("see docs/export.md", "export_quantization_bit export_legacy_format"),
    *_rows("see docs/export.md", "export_hub_model_id"),
    *_rows(_NO, "module_dropout use_llama_pro"),
    *_rows("the optimizer is AdamW", "galore_target apollo_rank badam_mode"),
    *_rows("the tracker's own setting", "swanlab_workspace swanlab_run_name swanlab_mode"),
    *_rows("of generating, not of training", "num_beams eval_num_beams max_length length_penalty"),
    *_rows("of generating, not of training", "skip_special_tokens"),
    *_rows(_MANY, "resources_per_worker"),
)
"""Of LLaMA-Factory."""

AXOLOTL = (
    *_rows(_TOKENS, "mean_resizing_embeddings embeddings_skip_upcast added_tokens_overrides"),
    *_rows(_TOKENS, "peft_trainable_token_indices fix_untrained_tokens"),
    *_rows("see docs/export.md", "qat quantization"),
    *_rows("rows are read whole; take uses the first", "dataset_shard_num dataset_shard_idx"),
    *_rows(_FOUND, "skip_prepare_dataset dataset_keep_in_memory remove_unused_columns"),
    *_rows(_FOUND, "sample_packing_group_size sample_packing_bin_size multipack_real_batches"),
    *_rows(_FOUND, "sample_packing_sequentially pretraining_sample_concatenation tiled_mlp"),
    *_rows(_FOUND, "pretrain_multipack_buffer_size pretrain_multipack_attn low_cpu_mem_usage"),
    *_rows(_FOUND, "gpu_memory_limit lora_on_cpu qlora_sharded_model_loading profiler_steps"),
    *_rows(_FOUND, "experimental_skip_move_to_device merge_method include_tokens_per_second"),
    *_rows("the last, smaller batch is used too", "dataloader_drop_last"),
    *_rows(_MANY, "accelerator_config world_size ddp_bucket_cap_mb ddp_broadcast_buffers"),
    *_rows(_MANY, "fsdp_final_state_dict_type heads_k_stride ring_attn_func dp_shard_size"),
    *_rows(_MANY, "dp_replicate_size ray_run_name ray_num_workers resources_per_worker"),
    *_rows("held-out rows give loss and accuracy", "do_causal_lm_eval eval_causal_lm_metrics"),
    *_rows("held-out rows give loss and accuracy", "bench_dataset bench_split"),
    *_rows("held-out rows give loss and accuracy", "dpo_generate_during_eval"),
    *_rows("held-out rows have the same length", "eval_sequence_len"),
    *_rows("set model.rope_scaling", "use_pose pose_split_on_token_ids pose_max_context_len"),
    *_rows("set model.rope_scaling", "pose_num_chunks rope_scaling"),
    *_rows(_KERNELS, "flex_attn_compile_kwargs flash_attn_fuse_qkv flash_attn_fuse_mlp"),
    *_rows(_KERNELS, "flash_optimum unsloth_rms_norm unsloth_rope torch_compile_backend"),
    *_rows(_KERNELS, "torch_compile_mode use_kernels dpo_use_liger_kernel"),
    *_rows("name modules in adapter.targets", "peft_layers_pattern peft_layer_replication"),
    *_rows(_MODEL, "peft_ensure_weight_tying peft_autocast_adapter_dtype cls_model_config"),
    *_rows(_MODEL, "tokenizer_use_mistral_common processor_type tokenizer_save_jinja_files"),
    *_rows(_MODEL, "llama4_linearized_experts model_quantization_config"),
    *_rows(_MODEL, "model_quantization_config_kwargs overrides_of_model_config"),
    *_rows("no option of an optimizer", "torchdistx_path lr_div_factor adam_epsilon2 adam_beta3"),
    *_rows(_NO, "relora_prune_ratio relora_prune_method relora_cpu_offload lisa_step_interval"),
    *_rows(_NO, "lisa_layers_attribute trainer_cls"),
    *_rows("the tracker's own setting", "hf_mlflow_log_artifacts comet_workspace comet_mode"),
    *_rows("the tracker's own setting", "comet_project_name comet_experiment_key comet_online"),
    *_rows("the tracker's own setting", "comet_experiment_config"),
    *_rows("alignkit chat talks to a run", "gradio_title gradio_share gradio_server_name"),
    *_rows("alignkit chat talks to a run", "gradio_server_port gradio_max_new_tokens"),
    *_rows("alignkit chat talks to a run", "gradio_temperature"),
)
"""Of Axolotl."""
