"""Tensors, corpora, manifests and pseudo-gradients as bytes, and text on its way to a corpus. No torch."""
