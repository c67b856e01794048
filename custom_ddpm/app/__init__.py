"""The page of `custom-ddpm app`: draw with a model, edit pictures, and watch trainings, in a browser."""
