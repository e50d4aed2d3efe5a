"""Studies: several runs through the contract's commands, then their evaluation."""
