"""Traces a module into one graph that computes the same: the tracer, and how it records what."""

from pn_compiler.tracing.fixed_arguments import check_fixed

__all__ = ["check_fixed"]  # models that were saved by the first versions refer to it by this name
