"""Proof-of-Loss: from paired losses to consensus, trust, copies, ranks, rewards and verdicts. Pure."""
