"""`HookedTransformer`, put together from one mixin per concern."""
