"""Quantities and figures for people: `formats` writes numbers as text, `svg` draws pictures."""
