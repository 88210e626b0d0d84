"""The rules of a run, pure: what may be asked for, commitments, beacons, assignment, bans, quotas, objectives."""
