"""Loads a module from a model file without running code from the file.

A pickle names functions and calls them; an exported program names operators and holds expressions. Both are
checked against allowlists before torch reads them. Everything else is refused by name.
"""

from pn_compiler.loading.loaded import LoadedModel
from pn_compiler.loading.model_file import load_model

__all__ = ["LoadedModel", "load_model"]
