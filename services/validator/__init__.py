"""The validator: measures on held-out data what each submission does to the full model, and signs what it found."""
