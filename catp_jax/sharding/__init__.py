"""Models on many devices: which axis of which array is split over which axis of the mesh."""
