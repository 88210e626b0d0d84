"""Verbs over a library of experts: find, check, compose, shrink and export them. `connito.library` offers them."""
