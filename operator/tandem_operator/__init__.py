"""The Tandem operator: InferenceService objects become pods, services, roles and status."""
