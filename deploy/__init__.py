"""How the service is put together and run."""
