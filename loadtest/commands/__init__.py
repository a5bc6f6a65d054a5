"""The commands ``kvthrift loadtest``, ``compare`` and ``report``."""
