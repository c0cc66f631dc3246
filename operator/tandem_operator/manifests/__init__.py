"""Pure builders of manifests: the same input gives the same object, byte for byte."""
