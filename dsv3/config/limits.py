"""The most that each number of a config may be, wherever it comes from: typed, stored, or of a config.json.

A number of this size is planned for within seconds; a larger one is a mistake or an attack: layers, experts
and ranks are counted one by one. strict.py compares every number of every schema with this table, so the
table holds for config.yaml, model.yaml and config.json as well. docs/reliability.md lists it.
"""

from typing import Any

from dsv3.errors import InvalidValue

LARGEST = 2**63 - 1
"""The largest whole number that a tensor or a file of tensors counts with."""

WHOLE = 2**53
"""The most of a whole number that is not listed: tokens, steps, bytes. Floats count up to here exactly."""

REAL = 1e18
"""The most of a fractional number that is not listed: the product of a dozen of them is finite."""

ITEMS = 10_000
"""The most values of a list."""

LARGEST_VOCABULARY = 2**24
"""Token ids of a vocabulary, and rows of an embedding. The largest tokenizers have 2^18."""

_WIDTH = 2**20
"""Values of a vector of the model, such as `dim` or the width of a latent."""

_RANKS = 2**20
"""Ranks of a job."""

_BATCH = 2**17
"""Sequences of a step."""

_THREADS = 4096

LIMITS: dict[str, dict[str, int | float]] = {
    "ModelConfig": {
        "vocab_size": LARGEST_VOCABULARY,
        "dim": _WIDTH,
        "num_layers": 1024,
        "num_dense_layers": 1024,
        "dense_hidden_dim": 2**24,
        "mtp_depths": 64,
    },
    "AccidentsConfig": dict.fromkeys(("spike_window", "within", "alarm_window"), ITEMS),
    "AttentionConfig": {
        "heads": 2**16,
        "q_lora_rank": _WIDTH,
        "kv_lora_rank": _WIDTH,
        "qk_nope_head_dim": _WIDTH,
        "qk_rope_head_dim": _WIDTH,
        "v_head_dim": _WIDTH,
    },
    "MoEConfig": {
        "num_experts": 2**16,
        "top_k": 2**16,
        "num_shared_experts": 2**16,
        "hidden_dim": 2**24,
        "num_groups": 2**16,
        "top_k_groups": 2**16,
    },
    "RopeConfig": {"original_sequence_length": 2**30},
    "MuonConfig": {"ns_steps": 1000},
    "DegreesConfig": {
        "pp": 256,
        "dp_replicate": _RANKS,
        "dp_shard": _RANKS,
        "cp": _RANKS,
        "tp": _RANKS,
        "ep": _RANKS,
    },
    "ExpertParallelConfig": {"ranks_per_node": _RANKS},
    "PipelineConfig": {"stages_per_rank": 1024},
    "ParallelConfig": {"min_world_size": _RANKS},
    "HardwareConfig": {"devices_per_node": _RANKS},
    "LaunchConfig": {
        "nproc": 2**12,
        "nnodes": _RANKS,
        "node_rank": _RANKS,
        "world_size": _RANKS,
        "timeout": 10**8,
        "max_restarts": 10**6,
    },
    "SlurmLaunchConfig": {"cpus_per_task": _THREADS},
    "TrainConfig": {
        "global_batch_size": _BATCH,
        "microbatch_size": _BATCH,
        "sequence_length": 2**30,
        "prefetch": 2**10,
        "seed": LARGEST,
    },
    "BatchRampConfig": {"start": _BATCH, "increment": _BATCH},
    "ShardsDataConfig": {"eos_id": LARGEST_VOCABULARY},
    "TokensDataConfig": {"pad_id": LARGEST_VOCABULARY},
    "HubDataConfig": {"lanes": _BATCH, "lane_rows": 2**30, "shuffled_documents": 2**30},
    "TrainedTokenizerConfig": {"vocab_size": LARGEST_VOCABULARY},
    "GenerateTaskConfig": {"max_tokens": 2**24},
    "VerifyTaskConfig": {"sequences": _BATCH, "tokens": 2**24},
    "PrepareTaskConfig": {"workers": _THREADS},
    "CacheTaskConfig": {"unused_days": 10**6},
}
"""By schema and field. A schema has those of the schemas that it extends; test_limits.py holds the names."""

EXPERTS = 2**20
"""Experts of all layers of a model together: each has three weights with names of their own."""


def most(schema: type, field: str, kind: type = int) -> int | float:
    """Return the most that a number of `kind` (int or float) may be in a field of a schema."""
    for base in schema.__mro__:
        if field in LIMITS.get(base.__name__, {}):
            return LIMITS[base.__name__][field]
    return WHOLE if kind is int else REAL


def require_within(schema: type, field: str, key: str, value: Any) -> None:
    """Raise InvalidValue for a number, or one in a list, above the most or below its negative.

    `key` is the name that the message gives to the field.
    """
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) > ITEMS:
        raise InvalidValue(key, f"a list of {len(numbers):,} values", f"must have at most {ITEMS:,}")
    for number in numbers:
        if isinstance(number, int | float) and not isinstance(number, bool):
            limit = most(schema, field, type(number))
            if not -limit <= number <= limit:
                low = f" and at least -{limit:,}" if number < 0 else ""
                raise InvalidValue(key, value, f"must be at most {limit:,}{low}")
