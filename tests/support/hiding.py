"""Python that hides what the environment names in HIDDEN: nobody finds it, as where it is not installed."""

from __future__ import annotations

# In this process and those that it starts, where it is their sitecustomize.
HIDING = """
import os, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ.get("HIDDEN", "").split():
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
