"""Contents of the wire and the log: identities, envelopes, subjects, and a run as the set of its facts."""
