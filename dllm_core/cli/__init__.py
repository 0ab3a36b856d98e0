"""The command line: finished cells tried by hand. The one place in the library that prints and parses arguments.

It knows of a run only that its cells lie in one directory, each of them as `load_cell` takes it.
"""
