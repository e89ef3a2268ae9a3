"""Persona features and emergent misalignment, end to end. `python -m personas --help` says what it does."""

import logging

# Where it is installed, it reports on import a kernel that nothing here uses, once a command.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
