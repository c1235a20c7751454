# Types of what is imported when it is asked for.
from molehill.catalogue import methods as methods
from molehill.config import Config as Config
from molehill.errors import MolehillError as MolehillError
from molehill_simulation.loaded import load as load
from molehill_simulation.simulate import simulate as simulate

__version__: str
__all__ = ["Config", "MolehillError", "load", "methods", "simulate"]
