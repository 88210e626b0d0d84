"""What people do with a library of experts: find, check, compose, shrink and export them. `connito.library` offers it."""
