"""Generated from `proto/connito/v1`. Do not edit: run `make proto`."""
