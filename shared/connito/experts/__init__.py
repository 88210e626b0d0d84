"""Work with finished experts: load, compose, prune, extract, export, start from. Needs torch when used."""
