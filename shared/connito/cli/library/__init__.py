"""The commands of `connito library`, one module for each kind of work."""
