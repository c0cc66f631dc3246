"""From the pydantic models to `crds/*.yaml`, the chart's copy and `docs/api.md`."""
