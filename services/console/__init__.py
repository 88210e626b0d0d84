"""The console: a web page over the log. It reads, verifies and shows; it has nothing to write and no key to write with."""
