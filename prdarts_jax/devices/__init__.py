"""Devices, meshes, and the several processes of one run."""
