"""The bundled toy world. A package, so that no other module named toy is taken for it."""
