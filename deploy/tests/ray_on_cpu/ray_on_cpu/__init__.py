"""Lets vLLM's Ray executor place workers on CPUs: put the folder around this one on PYTHONPATH.

vLLM's CPU platform names no resource of Ray's, and is refused. This one, which vLLM takes by its
own entry point ``vllm.platform_plugins``, names GPUs; a node has as many as
``ray start --num-gpus`` says. For tests: the multiprocessing executor needs none of it.
"""


def platform() -> str:
    return "ray_on_cpu.platform.RayOnCpu"
