"""Persona features and emergent misalignment, end to end. `python -m personas --help` says what it does."""

import logging
import warnings

# Where it is installed, it reports on import a kernel that nothing here uses, once a command.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# TRL and peft call transformers by names that it has changed: nothing that a user could do.
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing`", category=FutureWarning)
