"""`fewstep bench data`: what the reading of shards reaches, beside other readers of the same bytes."""
