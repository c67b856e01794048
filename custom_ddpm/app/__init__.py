"""The page: `custom-ddpm app`."""
