"""Base models: making one by clustered upcycling, describing it as byte ranges, loading it whole or in part."""
