"""Behaviour that several backends share: suites to inherit from, and the programs they run."""
