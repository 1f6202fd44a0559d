"""The decode processes. A package of its own: each process imports it, and shall not load the store or the settings."""
