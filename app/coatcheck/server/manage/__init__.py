"""Use cases that write, used alike by the command line, the API and the console.

Nothing here signs tokens: this room never imports `signing`.
"""
