"""Name the keys of a config.json that change no number of the model.

The classes of V2 and V3 (DeepSeek's own and those of transformers) take these keys and never compute with
them in a forward pass. tests/hf/derived_keys.py derives the list from transformers' source, and a test
compares.
"""

_NEUTRAL = """
_attn_implementation _commit_hash _name_or_path add_cross_attention
assistant_confidence_threshold assistant_lookbehind attention_dropout attn_implementation
auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id ep_size
epsilon_cutoff eta_cutoff experts_implementation exponential_decay_length_penalty
finetuning_task forced_bos_token_id forced_eos_token_id head_dim id2label is_decoder
is_encoder_decoder label2id length_penalty max_length min_length name_or_path
no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
num_beams num_key_value_heads num_labels num_return_sequences output_attentions
output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
problem_type pruned_heads qk_head_dim remove_invalid_values repetition_penalty return_dict
return_dict_in_generate sep_token_id seq_aux suppress_tokens target_lookbehind
task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""

NEUTRAL_KEYS = frozenset(_NEUTRAL.split())
"""Top-level keys of config.json: bookkeeping, generation, training, and what follows from other keys."""

_ROPE = """
rope_theta rope_type type factor original_max_position_embeddings
beta_fast beta_slow mscale mscale_all_dim
"""

ROPE_KEYS = frozenset(_ROPE.split())
"""Keys of rope_parameters (or rope_scaling) that DeepSeek's rotary embedding computes with."""

_NEUTRAL_ROPE = """
high_freq_factor long_factor low_freq_factor max_position_embeddings short_factor
"""

NEUTRAL_ROPE_KEYS = frozenset(_NEUTRAL_ROPE.split())
"""Keys of rope_parameters that neither RoPE nor YaRN reads: a length, and those of other embeddings."""

NEUTRAL_ROPE_VALUES = {"attention_factor": (None,), "truncate": (True,), "partial_rotary_factor": (None, 1)}
"""Keys that transformers' YaRN reads and DeepSeek's code does not have -> the values that change nothing."""
