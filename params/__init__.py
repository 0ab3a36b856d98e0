"""What a run is made of: presets, cells, and the schema that validates them. Imports no torch."""

from params.errors import ParamsError
from params.loader import cell_names, load, preset_names
from params.schema import CellSpec, GridSpec, RowSpec

__all__ = ["CellSpec", "GridSpec", "ParamsError", "RowSpec", "cell_names", "load", "preset_names"]
