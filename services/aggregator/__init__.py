"""The aggregator: consensus of scores, rewards, robust merge, outer step, gate, and the next model version."""
