"""One row a trial, whoever dies: storage, leases, claims, the ledger."""
