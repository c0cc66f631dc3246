"""From a configuration to a runner: the top floor of what owns tensors."""
