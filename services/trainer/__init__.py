"""The trainer: what a miner runs. Local steps on the target experts, then commit, upload, reveal."""
