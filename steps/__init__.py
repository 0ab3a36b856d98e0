"""One module per pipeline step: plain functions, spec in, small dataclass out."""
