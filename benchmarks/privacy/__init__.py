"""An attack on the private mechanism: it must not learn more than is stated, and must where that is broken."""
