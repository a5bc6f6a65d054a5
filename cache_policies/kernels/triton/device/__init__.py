"""Device functions: Triton code, compiled for a GPU or run by Triton's interpreter.

Every function takes ``PAGE``, a compile-time ``kernels.triton.page.Page``. ``request`` is the
tuple that ``place.request_of`` makes: what it takes to find the bytes of one request and KV head;
``store`` that of its store pages (``place.store_of``, ``place.chosen_of``).
"""
