"""Pseudo-gradients in few bytes: codecs that decode to the bit on every machine, and the file that carries them. No torch."""
