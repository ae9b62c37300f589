"""Derive from transformers' source the keys that its DeepSeek classes take and never compute with.

`python -m tests.hf.derived_keys` prints the list for dsv3/hf/neutral_keys.py. transformers is read as text,
which takes a tenth of importing it.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

MODELS = ("deepseek_v2", "deepseek_v3")

RELEASED = {"aux_loss_alpha", "auto_map", "ep_size", "pretraining_tp", "seq_aux"}
"""Keys of DeepSeek's own config class that its modeling code reads in training alone, or never."""

OF_VERSION_4 = {
    *("_attn_implementation", "_name_or_path", "add_cross_attention", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "finetuning_task", "is_decoder", "num_labels", "prefix", "pruned_heads"),
    *("sep_token_id", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class"),
    *("torch_dtype", "torchscript", "use_bfloat16"),
}
"""Keys that transformers 4 writes for every model; version 5 takes them without fields of its own."""

WITHOUT_EFFECT = {
    "_attn_implementation",
    "attention_dropout",
    "head_dim",
    "num_key_value_heads",
    "pad_token_id",
}
"""Keys that the classes read and that do not change a forward pass.

The implementations of attention compute the same, dropout acts in training alone, and the padding id acts
on a gradient. head_dim is overwritten by qk_rope_head_dim, and latent attention repeats no key or value.
"""

NOT_NEUTRAL = {"architectures", "model_type", "per_layer_config", "tie_word_embeddings"}
"""Keys of transformers' base class that say what is computed."""


def source(name: str) -> ast.Module:
    """Return a module of transformers, by its path in the package without the suffix."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / f"{name}.py").read_text())


def _function(module: ast.Module, name: str) -> ast.FunctionDef:
    found = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == name]
    assert len(found) == 1, name
    return found[0]


def _class_fields(module: ast.Module, name: str) -> tuple[set[str], dict[str, str]]:
    """Return the annotated fields of a class that are no ClassVar, and its attribute_map."""
    (found,) = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    fields, aliases = set(), {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" not in ast.unparse(node.annotation):
                fields.add(node.target.id)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "attribute_map":
            aliases = ast.literal_eval(node.value)
    return fields, aliases


def _texts(tree: ast.AST, function: str) -> Iterator[str]:
    """Yield the texts that calls of `function` have as their first argument that is a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(function):
            texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
            yield from [text for text in texts if isinstance(text, str)][:1]


def _generation_keys() -> set[str]:
    """Return the defaults of generation, which older versions wrote into config.json."""
    function = _function(source("generation/configuration_utils"), "_get_default_generation_params")
    (returned,) = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    assert isinstance(returned, ast.Dict)
    return {ast.literal_eval(key) for key in returned.keys if key is not None}


def keys_computed_with() -> set[str]:
    """Return the keys that the modeling code of V2 and V3 reads, by attribute or by getattr."""
    found = set()
    for model in MODELS:
        module = source(f"models/{model}/modeling_{model}")
        found |= {
            node.attr
            for node in ast.walk(module)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config")
        }
        found |= set(_texts(module, "getattr"))
    return found - WITHOUT_EFFECT


def neutral_keys() -> set[str]:
    """Return the keys that the classes of V2 and V3 take without computing with them."""
    base = source("configuration_utils")
    taken = RELEASED | OF_VERSION_4 | WITHOUT_EFFECT | _generation_keys()
    taken |= _class_fields(base, "PreTrainedConfig")[0]
    (post_init,) = [
        node
        for class_ in base.body
        if isinstance(class_, ast.ClassDef) and class_.name == "PreTrainedConfig"
        for node in class_.body
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
    ]
    taken |= set(_texts(post_init, "kwargs.pop"))
    computed = keys_computed_with() | NOT_NEUTRAL
    for model in MODELS:
        name = f"Deepseek{model.removeprefix('deepseek_').upper()}Config"
        fields, aliases = _class_fields(source(f"models/{model}/configuration_{model}"), name)
        taken |= fields | {"qk_head_dim"}  # which __post_init__ computes
        computed |= {key for pair in aliases.items() for key in pair}
    return {key for key in taken if not key.startswith("base_model_")} - computed


def rope_keys() -> dict[str, set[str]]:
    """Return the keys of rope_parameters that each kind of rotary embedding reads, by the kind's name."""
    found = {}
    for node in source("modeling_rope_utils").body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_compute_"):
            kind = node.name.removeprefix("_compute_").removesuffix("_parameters")
            subscripts = [each for each in ast.walk(node) if isinstance(each, ast.Subscript)]
            found[kind] = set(_texts(node, "rope_parameters_dict.get"))
            found[kind] |= set(_texts(node, "config.rope_parameters.get"))
            found[kind] |= {
                ast.literal_eval(each.slice)
                for each in subscripts
                if ast.unparse(each.value) == "rope_parameters_dict" and isinstance(each.slice, ast.Constant)
            }
    return found


if __name__ == "__main__":
    print(" ".join(sorted(neutral_keys())))
