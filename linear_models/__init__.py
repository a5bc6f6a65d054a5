"""Models of constant memory on a CPU: recurrences in C++, in vLLM through its registries.

``scans`` holds the recurrences and knows no vLLM; the modules beside it put them into vLLM.
"""
