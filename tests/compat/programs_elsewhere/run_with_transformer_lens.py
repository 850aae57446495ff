"""``python run_with_transformer_lens.py PROGRAM FOLDER``: a program here with TransformerLens 3.

AutoCircuit 1.0 imports the keys' and values' cache by the module and name of TransformerLens 2;
fastlens has both.
"""

import runpy
import sys
import types
import warnings
from typing import Any

warnings.simplefilter("ignore")

import transformer_lens

lens: Any = transformer_lens
lens.HookedTransformerKeyValueCache = lens.TransformerLensKeyValueCache
older: Any = types.ModuleType("transformer_lens.past_key_value_caching")
older.HookedTransformerKeyValueCache = lens.TransformerLensKeyValueCache
sys.modules[older.__name__] = older
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
