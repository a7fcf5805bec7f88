"""The search service: branch weights by Optuna, Ray and PostgreSQL, on top of ``bdense``."""
