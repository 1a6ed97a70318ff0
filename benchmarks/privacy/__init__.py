"""An attack on the private mechanism: what it learns is bounded by what is stated, unless that is broken."""
