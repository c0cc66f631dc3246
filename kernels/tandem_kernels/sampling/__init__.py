"""From logits to one token per row."""

from tandem_kernels.sampling.reference import filter_logits, sample_inverse_cdf

__all__ = ["filter_logits", "sample_inverse_cdf"]
