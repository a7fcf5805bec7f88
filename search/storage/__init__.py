"""The ledger: one row a trial, claimed under leases, whichever process dies."""
