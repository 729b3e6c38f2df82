"""From a module to one graph that computes what it computes: the tracer, and what it records how."""

from pn_compiler.tracing.fixed_arguments import check_fixed

__all__ = ["check_fixed"]  # models that were saved by the first versions refer to it by this name
