"""Ground floor: the specification of every op (`reference`) and the faster kernels beside it."""
