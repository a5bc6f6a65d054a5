"""Triton's interpreter patches its language at every call of a device function; once is enough."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import triton

if triton.knobs.runtime.interpret:
    from triton.runtime import interpreter

    patch_language, run_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = (triton.language, triton.language.core)
    patched: set[tuple[bool, ...]] = set()  # which of the modules the functions so far have seen

    def patch_once(function: Any) -> Any:
        known = [x for x in function.__globals__.values() if inspect.ismodule(x)]
        seen = tuple(module in known for module in modules)
        if seen in patched:
            return None
        patched.add(seen)
        return patch_language(function)

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return run_grid(self, *arguments, **options)

    # Two more operations for each one of integers, to find what overflows.
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run
