"""The ``kvthrift`` command and what it serves."""
