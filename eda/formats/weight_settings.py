"""Names of the formats that weights can be asked for in; without torch, for settings and commands."""

from typing import Literal

WeightSetting = Literal["auto", "float32", "bfloat16", "int8", "int4"]
"""``auto`` keeps the checkpoint's precision as far as this machine is fast in it."""
