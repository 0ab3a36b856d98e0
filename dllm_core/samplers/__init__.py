"""Token-space decoding: one generation config and one loop for every model that fills in masked tokens."""
