"""From a model file to a module, without running code that the file brings.

A pickle names functions and calls them, an exported program names operators and holds expressions: both
are read against lists of what is harmless before torch reads them. Everything else is refused by name.
"""

from pn_compiler.loading.model_file import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
