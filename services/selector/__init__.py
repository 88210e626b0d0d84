"""The selector: reads which experts a domain's text uses, and fixes the targets of a run."""
