"""A whole platform on one machine: the supervisor behind `connito up`. It starts the production services."""
