"""The expert library's formats: the expert file, the record that describes it, and the card people read. No torch."""
