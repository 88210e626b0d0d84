"""What goes over the wire and into the log: identities, envelopes, subjects, and a run as the set of its facts."""
