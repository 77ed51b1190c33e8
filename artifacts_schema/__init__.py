"""Ground floor: what artifacts look like, how they are named and how they reach the disk. Imports no tensor library."""

__version__ = "0.1.0"
