"""From a worker's configuration to its runner: the engine's top floor below the core."""
