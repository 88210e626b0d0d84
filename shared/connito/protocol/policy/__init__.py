"""The law of run policies: their choices, defaults, limits and profiles, and the check of a spec against it."""
