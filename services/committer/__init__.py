"""The committer turns what miners say into facts: whose commitment stands, which reveals will be scored."""
