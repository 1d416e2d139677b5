"""What a server holds of adapters while it runs: the registry, leases, guard and traffic."""
