"""Read data as people have it: rows of any file, folder, archive, data set or address, one at a time."""
