"""From scored submissions to the next version: candidates, robust aggregation, the outer step and the gate."""
