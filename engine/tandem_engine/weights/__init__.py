"""The parameters of a model, from safetensors or GGUF files, or random ones."""
