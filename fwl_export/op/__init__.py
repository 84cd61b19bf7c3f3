"""The op `fwl::LinearAttentionUpdate`: its definition, and what follows from it."""
