"""A run as people see it, made from its facts: reports, standings, ledgers, the live table. Sentences are made here."""
