"""Devices as data: one TOML file a device."""
