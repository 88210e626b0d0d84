"""Recomputing a run from its log and its artifacts: what an auditor does, and what a submission's receipt says.

`evidence`   the stored messages of a run, verified
`intake`, `judging`, `history`   pure checks over the facts
`artifacts`  the objects that the log names, each fetched and hashed
`recompute`  selection, losses, merges and the deposited expert, from those objects
`receipts`   the same for one submission
`chain`      hashes over the log, so that two auditors can compare what they read
"""
