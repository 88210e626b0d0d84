"""What services compute with a model: selecting, scoring, gating, gathering what that takes. Needs torch when used."""
