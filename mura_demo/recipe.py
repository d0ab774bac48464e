"""The number of the renderer's recipe. Imports nothing.

Raise it by hand whenever the films change, and only then: data of another recipe are other data to every
cache and run. A test holds small golden films of the number in use, so a changed film cannot go unnoticed.
"""

RECIPE = 4
