"""How long is fuzzed: a little in the usual run, ``EDA_FUZZ_EXAMPLES`` examples of each kind by ``make fuzz``."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # mutations.py

settings.register_profile(
    "files",
    max_examples=int(os.environ.get("EDA_FUZZ_EXAMPLES", "25")),
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    derandomize="EDA_FUZZ_EXAMPLES" not in os.environ,  # the usual run is the same each time
)
