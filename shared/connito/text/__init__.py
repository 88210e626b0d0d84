"""Text on its way to a corpus: where it comes from, what is dropped, and how it is split."""
