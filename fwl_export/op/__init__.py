"""The op `fwl::LinearAttentionUpdate`: its one definition, and what is derived from it."""
