"""Keeps a library of Jupyter's away, which costs each process that imports Ray more than a second.

Ray imports jsonschema, and that builds forty parsers for formats that nobody checks here, where it finds it.
"""

raise ImportError("jsonschema does without it")
