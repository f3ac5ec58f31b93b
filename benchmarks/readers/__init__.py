"""Readers of published emotion benchmarks: a folder becomes clips with true labels. The data are for their users to obtain."""
