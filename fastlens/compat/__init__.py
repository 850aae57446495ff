"""TransformerLens' own module names, for code that is written against them."""

from fastlens.compat import utils as utils
