"""Released checkpoints: HuggingFace's names, config.json and safetensors files, read and written strictly."""
