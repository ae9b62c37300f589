"""HuggingFace checkpoints: names, config.json, safetensors files, and reading them as if they were a DCP."""
