"""The service in the making: what it remembers, accounts and conversations are here; nothing answers HTTP yet."""
