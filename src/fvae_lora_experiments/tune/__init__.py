"""A search for a method's best settings with Optuna: trials are runs that validation alone judges."""
