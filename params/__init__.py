"""What a run is made of: presets, cells, and the schema that validates them. Imports no torch."""
