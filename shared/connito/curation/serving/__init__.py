"""`connito serve`: one resident base and many experts behind OpenAI's interface (docs/adr/0033-serving-many-experts.md)."""
