"""Device functions: Triton code, compiled for a GPU or run by Triton's interpreter.

Every function takes ``PAGE``, a compile-time ``kernels.triton.page.Page``. ``store`` is the tuple
that ``place.store_of`` makes: what it takes to find the pages of one request and KV head.
"""
