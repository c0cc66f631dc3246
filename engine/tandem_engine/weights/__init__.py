"""From files to the parameters of a model: safetensors, GGUF, or random ones."""
