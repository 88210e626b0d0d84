"""The customer's side of a run: `job.yaml`, its check, quote, submission and delivery report."""
