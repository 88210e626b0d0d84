"""Computations that services do with a model: selecting, scoring, gating and their inputs. Needs torch when used."""
