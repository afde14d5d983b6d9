"""What every op stands on: derivatives, primitives, batch axes, sharding, the extension module. Knows no op."""
