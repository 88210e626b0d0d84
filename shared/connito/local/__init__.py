"""Everything on one machine: the supervisor behind `connito up`. The services it starts are the production ones."""
